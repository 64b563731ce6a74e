-- Whose message is next in a queue where several tenants wait: start-time fair queueing (Goyal, Vin and Cheng,
-- 1996). Each tenant has a tag, the virtual time at which its next job starts. The lowest tag is next, and
-- then grows by the job's cost divided by the tenant's weight: 1 for a job of as many pixels x steps as those
-- before it had on average, and for one that does not say. A tenant that comes starts at the queue's
-- virtual time, less what it may be ahead: so its first jobs are next, however many others wait. What a tenant
-- had is remembered when it leaves, so that it gains nothing by coming again. Jobs without a tenant count as
-- one tenant more. Their lists are looked at each time that it is their turn: producers of earlier versions
-- tell nobody that they have put a message.
--
-- Beside the queue's lists there are, for its urgent priorities (0) and for the others (1):
--   arrivals      list  tenants one of whose empty lists got a message; and `MARK`, while there are tags. So the
--                       pop that looks for messages finds whether tenants wait, at no cost where none do.
--   shares .. :0, :1  zset  the tags of the tenants that may have messages
--   shares .. :book   hash  `v` the virtual time, `none` the tag of jobs without a tenant, `mean` the pixels x
--                     steps of a job on average
--   shares .. :left   zset  the tags of tenants that have left, while they count
--
-- An error after a message was popped would lose it: so from there on none is raised.
-- include ../contract/put.lua
local MARK = '*'
-- What a tenant may be ahead of the others, in jobs of cost 1 by weight 1.
local AHEAD = 16
-- Arrivals, and tenants that turn out to have left, that are looked at in one call. Before each of them there
-- was a message, so there are on average no more than two for a message.
local AT_ONCE = 32
-- Seconds that what tenants had is remembered when none waits any more.
local REMEMBERED_S = 60

local function text(number) return string.format('%.17g', number) end

-- A tenant's lists in a queue, most urgent first.
--
-- classes  0, 1 or both
local function lists_of(queue, tenant, classes)
  local lists = {}
  for _, class in ipairs(classes) do
    for step = 5 * class, 5 * class + 4 do
      lists[#lists + 1] = queue .. '\6\22' .. step .. '\6\22t=' .. tenant
    end
  end
  return lists
end

-- Pops the first message of some lists.
-- Returns  the list and the message; nothing when all are empty
local function pop_from(lists)
  if #lists == 0 then return end
  local command = {'LMPOP', #lists, unpack(lists)}
  command[#command + 1] = 'RIGHT'
  local found = redis.pcall(unpack(command))
  if not found then return end
  if not found.err then return found[1], found[2][1] end
  -- Redis 6.2 has no LMPOP.
  for _, list in ipairs(lists) do
    local raw = redis.pcall('RPOP', list)
    if type(raw) == 'string' then return list, raw end
  end
end

-- Returns  the tenant with the lowest tag, and its tag; nothing when there is none
local function lowest(shares, classes)
  local tenant, tag
  for _, class in ipairs(classes) do
    local head = redis.call('ZRANGE', shares .. ':' .. class, 0, 0, 'WITHSCORES')
    local found = tonumber(head[2])
    if found and not (tag and tag <= found) then tenant, tag = head[1], found end
  end
  return tenant, tag
end

-- Gives tags to tenants that have come to a class of priorities. Whoever has no message is no tenant.
local function let_in(shares, queue, class, tenants, v)
  for _, tenant in ipairs(tenants) do
    if #tenant <= 40 and string.find(tenant, '^[a-z0-9-]+$')
      and redis.call('EXISTS', unpack(lists_of(queue, tenant, {class}))) > 0 then
      local tag = tonumber(redis.call('ZSCORE', shares .. ':' .. 1 - class, tenant))
      if not tag then
        local left = tonumber(redis.call('ZSCORE', shares .. ':left', tenant))
        tag = math.max(left or v - AHEAD, v - AHEAD)
        if left then redis.call('ZREM', shares .. ':left', tenant) end
      end
      redis.call('ZADD', shares .. ':' .. class, 'NX', text(tag), tenant)
    end
  end
end

-- Takes the tag of a tenant that has no message of these classes.
local function leave_queue(shares, classes, tenant, tag, v)
  for _, class in ipairs(classes) do redis.call('ZREM', shares .. ':' .. class, tenant) end
  if #classes == 1 and redis.call('ZSCORE', shares .. ':' .. 1 - classes[1], tenant) then return end
  redis.call('ZADD', shares .. ':left', text(tag), tenant)
  local first = redis.call('ZRANGE', shares .. ':left', 0, 1, 'WITHSCORES')
  for i = 1, #first, 2 do
    if tonumber(first[i + 1]) <= v - AHEAD then redis.call('ZREM', shares .. ':left', first[i]) end
  end
end

local function weight_of(weights, tenant)
  local weight = tonumber(redis.pcall('HGET', weights, tenant))
  return weight and weight >= 0.01 and weight <= 100 and weight or 1
end

-- Pops the message that is next.
--
-- shares, weights  the key that theirs begin with, and the hash of weights
-- queue            the queue's name, complete
-- open, classes    which priorities may be fetched: 0, or both; and in which of these there may be tenants
-- come             by class what was in its list of arrivals
-- plain            the lists of jobs without a tenant
-- Returns  the list, the message, and a function to be told the job's cost; nothing when there is none; 'again'
--          when more has to be looked at than may be in one call
local function share_out(shares, weights, queue, open, classes, come, plain)
  local book = shares .. ':book'
  local known = redis.call('HMGET', book, 'v', 'none', 'mean')
  local tenant, tag = lowest(shares, classes)
  local v = tonumber(known[1]) or tag or 0
  local mine = math.max(tonumber(known[2]) or v, v - AHEAD)
  local have_come = false
  for _, class in ipairs(classes) do
    if #come[class] > 1 or come[class][1] ~= MARK then
      have_come = true
      let_in(shares, queue, class, come[class], v)
    end
  end
  if have_come then tenant, tag = lowest(shares, classes) end
  -- Returns  what a job adds to a tag of weight 1
  local function measure(cost)
    if not cost then return 1 end
    local mean = tonumber(known[3]) or cost
    redis.pcall('HSET', book, 'mean', text(mean + (cost - mean) / 64))
    return math.max(0.02, math.min(50, cost / mean))
  end
  local have_looked = false
  for _ = 1, AT_ONCE do
    if not have_looked and (not tenant or mine <= tag) then
      have_looked = true
      local list, raw = pop_from(plain)
      if raw then
        return list, raw, function(cost)
          local after = mine + measure(cost) / weight_of(weights, '')
          redis.pcall('HSET', book, 'v', text(math.max(v, mine)), 'none', text(after))
        end
      end
    end
    if not tenant then return end
    local list, raw = pop_from(lists_of(queue, tenant, classes))
    if raw then
      return list, raw, function(cost)
        local after = text(tag + measure(cost) / weight_of(weights, tenant))
        -- It has one tag, also in a class that may not be fetched now.
        for _, class in ipairs(#open == 1 and {0, 1} or classes) do
          redis.pcall('ZADD', shares .. ':' .. class, 'XX', after, tenant)
        end
        redis.pcall('HSET', book, 'v', text(math.max(v, tag)), 'none', text(mine))
      end
    end
    leave_queue(shares, classes, tenant, tag, v)
    tenant, tag = lowest(shares, classes)
  end
  return 'again'
end

-- Marks that tenants wait, for the next call.
local function mark(shares, open, classes, arrivals)
  local are_there = false
  for _, class in ipairs(classes) do
    if redis.call('EXISTS', shares .. ':' .. class) == 1 then
      are_there = true
      redis.call('RPUSH', arrivals[class], MARK)
    end
  end
  if not are_there and (#open == 2 or redis.call('EXISTS', shares .. ':1') == 0) then
    redis.call('EXPIRE', shares .. ':book', REMEMBERED_S)
    redis.call('EXPIRE', shares .. ':left', REMEMBERED_S)
  end
end
