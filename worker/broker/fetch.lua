-- Pops the next messages and registers them as held: each both or neither.
--
-- KEYS     hash of held messages, their index, list of unreadable messages, the room of those who wait for
--          messages in the same lists, what keys of shares begin with, the tenants' weights, then the lists in
--          fetching order: first those of arrivals (`shares.lua`)
-- ARGV     messages at most; who waits when there is no message, or '', its place in the room, milliseconds that
--          a place lasts; limits, separated by blanks: bytes of a message at most, seconds that the list of
--          unreadable messages stays, how many it has at most, bytes kept of each, why; two characters for each
--          of the lists: the number of its queue from '0', and the class of priorities of a list of arrivals, '0'
--          or '1'; then the queues as JSON, '' where messages are not acknowledged (`words_of` of
--          `worker.broker.layout`)
-- Returns  {number of the list from 0, message, delivery tag, and more messages of that list with their tags};
--          for a tenant's message the number of a list of the same queue; the tag is null for a message that was
--          moved to the list of unreadable ones; when all lists are empty {place in the room}, or {} for who does
--          not wait; {'again'} when there may be messages and this call has done enough
--
-- A delivery tag is printable ASCII without spaces; kombu's is a UUID.
-- The entry's empty exchange makes the queue its routing key: whoever restores it needs no bindings.
-- A full Redis refuses a script's first write if that may take memory, and none after it: so it pops first.
-- Functions that few calls need are included where they do: to make them takes longer than to pop a message.
-- include ../contract/clock.lua
-- include ../contract/put.lua
local FIRST_LIST, FIRST_QUEUE, LAST_LIST = 7, 7, #KEYS
-- Of so many messages that wait in a list, one call takes no more than one beyond its first. So a queue that is
-- short is spread over all workers.
local FOR_EACH_MORE = 64
local many, who, place, place_ms, limits, said = unpack(ARGV, 1, 6)
KEYS[LAST_LIST + 1] = 'RIGHT'

-- Returns  the number of the list among KEYS and the message; nothing when all lists are empty; an error alone
local function pop()
  local found = redis.pcall('LMPOP', LAST_LIST - FIRST_LIST + 1, unpack(KEYS, FIRST_LIST))
  if not found then return end
  if not found.err then
    for i = FIRST_LIST, LAST_LIST do
      if KEYS[i] == found[1] then return i, found[2][1] end
    end
  end
  if not string.find(found.err, 'nknown', 1, true) then return nil, nil, found end
  -- Redis 6.2 has no LMPOP.
  for i = FIRST_LIST, LAST_LIST do
    local raw = redis.call('RPOP', KEYS[i])
    if raw then return i, raw end
  end
end

-- What is said of a list among KEYS: its queue, and its class where it is one of arrivals.
local function about(i)
  local at = 2 * (i - FIRST_LIST) + 1
  return ARGV[FIRST_QUEUE + string.byte(said, at) - 48], tonumber(string.sub(said, at + 1, at + 1))
end

local i, raw, failure = pop()
local list, charge = KEYS[i], nil
if i and select(2, about(i)) then
  -- include shares.lua

  -- Pops the message that is next where tenants wait in the queue of the list of arrivals `i`, from which
  -- `entry` was popped. Those queues take turns, and so do the queues before it in fetching order.
  --
  -- Returns  as `share_out`, and the number of the message's list among KEYS, or of another one of its queue
  local function pop_shared(i, entry)
    local queue = about(i)
    local base = string.match(KEYS[i], '^(.+)\6\22arrivals\6\22[01]$')
    local arrivals, plain, before, is_before = {}, {}, {}, {['']=true}
    for k = FIRST_LIST, LAST_LIST do
      local name, class = about(k)
      if class and name == queue then
        arrivals[class] = KEYS[k]
      elseif class and k < i then
        is_before[name] = true
      elseif name == queue then
        plain[#plain + 1] = KEYS[k]
      elseif is_before[name] then
        before[#before + 1] = KEYS[k]
      end
    end
    local list, raw = pop_from(before)
    if raw then
      redis.call('RPUSH', KEYS[i], entry)
      for k = FIRST_LIST, LAST_LIST do
        if KEYS[k] == list then return list, raw, nil, k end
      end
    end
    local open, classes, come = {}, {}, {}
    for class = 0, 1 do
      if arrivals[class] then
        open[#open + 1] = class
        come[class] = redis.call('RPOP', arrivals[class], AT_ONCE) or {}
        if arrivals[class] == KEYS[i] then table.insert(come[class], entry) end
        if #come[class] > 0 then classes[#classes + 1] = class end
      end
    end
    local shares = KEYS[5] .. base
    local done, charge
    done, list, raw, charge = pcall(share_out, shares, KEYS[6], base, open, classes, come, plain)
    if not done then
      for class, names in pairs(come) do
        for _, name in ipairs(names) do redis.call('RPUSH', arrivals[class], name) end
      end
      error(list)
    end
    mark(shares, open, classes, arrivals)
    return list, raw, charge, i
  end

  for _ = 1, 8 do
    if failure or not i or not select(2, about(i)) then break end
    list, raw, charge, i = pop_shared(i, raw)
    if raw then break end
    if list == 'again' then return {'again'} end
    i, raw, failure = pop()
    list = KEYS[i]
  end
  if i and not failure and not charge and select(2, about(i)) then
    redis.call('RPUSH', KEYS[i], raw)
    return {'again'}
  end
end
if failure then return failure end
if not i or place ~= '' then
  -- include waiting_room.lua
  if not i then
    if who == '' then return {} end
    return {wait(KEYS[4], who, place, place_ms)}
  end
  leave(KEYS[4], who, place)
  call_next(KEYS[4])
end
local queue = about(i)
if queue == '' then
  return {i - FIRST_LIST, raw, ''}
end
local time, longest = now(), tonumber(string.match(limits, '^%d+'))

-- Returns  a message's delivery tag, and its cost; nothing where it has none, or is too long
local function read(raw)
  if #raw > longest then return end
  -- As our producers write it, a UUID at the end. Whoever writes another one elsewhere has two, and the worker
  -- sets that message aside.
  local tag = not charge and string.match(raw, '^"delivery_tag": "([%w-]+)"}}$', -56)
  if tag then return tag end
  local message = cjson.decode(raw)
  local headers = message.headers
  return message.properties.delivery_tag, charge and type(headers) == 'table' and headers['smallcat-cost']
end

-- Registers a message, or moves it to the list of those that cannot be read.
--
-- Returns  the message, which may have another tag now, and its tag; '' and false where it was moved; an error
--          alone where Redis refuses to register it
local function register(raw)
  local could, tag, cost = pcall(read, raw)
  if charge then charge(could and type(cost) == 'number' and cost >= 1 and cost <= 1e12 and cost or nil) end
  local reason, done = nil, false
  if could and type(tag) == 'string' and string.find(tag, '^[!-~]+$') then
    done = redis.pcall('ZADD', KEYS[2], 'NX', time, tag)
    if done == 0 then
      -- Under that tag another message is held, whose place this one would take: it gets a tag of its own.
      local at, to = string.find(raw, '"' .. tag .. '"', 1, true)
      tag = tag .. '#' .. time
      done = at and redis.pcall('ZADD', KEYS[2], 'NX', time, tag)
      if done == 1 then
        raw = string.sub(raw, 1, at) .. tag .. string.sub(raw, to)
      elseif not done or done == 0 then
        done, reason = false, 'a worker holds a message of its delivery tag'
      end
    end
  end
  if not done then
    local ttl, most, kept, why = string.match(limits, '^%d+ (%d+) (%d+) (%d+) (.*)$')
    local head = cjson.encode({at = tonumber(time), queue = cjson.decode('[' .. queue .. ']')[1],
                               reason = reason or why, bytes = #raw})
    redis.call('LPUSH', KEYS[3], head .. '\n' .. string.sub(raw, 1, kept))
    redis.call('LTRIM', KEYS[3], 0, most - 1)
    redis.call('EXPIRE', KEYS[3], ttl)
    return '', false
  end
  if type(done) == 'number' then
    done = redis.pcall('HSET', KEYS[1], tag, '[' .. raw .. ',"",' .. queue .. ']')
  end
  if type(done) == 'number' then return raw, tag end
  redis.pcall('ZREM', KEYS[2], tag)
  return done
end

local all = {raw}
if many ~= '1' and not charge then
  local more = math.min(many - 1, math.floor(redis.call('LLEN', list) / FOR_EACH_MORE))
  if more > 0 then
    for k, each in ipairs(redis.call('RPOP', list, more)) do all[k + 1] = each end
  end
end
local reply = {i - FIRST_LIST}
for k, each in ipairs(all) do
  local found, tag = register(each)
  if tag == nil then
    -- In the order in which they were.
    for back = #all, k, -1 do put('RPUSH', list, all[back]) end
    if k == 1 then return found end
    break
  end
  reply[2 * k], reply[2 * k + 1] = found, tag
end
return reply
