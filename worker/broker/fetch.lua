-- Pops the next message and registers it as held: both or neither.
--
-- KEYS     hash of held messages, their index, list of unreadable messages, the room of those who wait for
--          messages in the same lists, what keys of shares begin with, the tenants' weights, then the lists in
--          fetching order: first those of arrivals (`shares.lua`)
-- ARGV     bytes of a message at most, seconds that the list of unreadable messages stays, how many it has at
--          most, bytes kept of each, why; who waits when there is no message, or '', its place in the room,
--          milliseconds that a place lasts; two characters for each of the lists: the number of its queue from
--          '0', and the class of priorities of a list of arrivals, '0' or '1'; then the queues as JSON, '' where
--          messages are not acknowledged (`words_of` of `worker.broker.layout`)
-- Returns  {number of the list from 0, message, delivery tag}; for a tenant's message the number of a list of
--          the same queue; the tag is null for a message that was moved to the list of unreadable ones; when
--          all lists are empty {place in the room}, or {} for who does not wait; {'again'} when there may be
--          messages and this call has done enough
--
-- A delivery tag is printable ASCII without spaces; kombu's is a UUID.
-- The entry's empty exchange makes the queue its routing key: whoever restores it needs no bindings.
-- A full Redis refuses a script's first write if that may take memory, and none after it: so it pops first.
-- include ../contract/clock.lua
-- include waiting_room.lua
-- include shares.lua
local FIRST_LIST, FIRST_QUEUE = 7, 10

-- Returns  the number of the list among KEYS and the message; nothing when all lists are empty; an error alone
local function pop()
  local command = {'LMPOP', #KEYS - FIRST_LIST + 1, unpack(KEYS, FIRST_LIST)}
  command[#command + 1] = 'RIGHT'
  local found = redis.pcall(unpack(command))
  if not found then return end
  if not found.err then
    for i = FIRST_LIST, #KEYS do
      if KEYS[i] == found[1] then return i, found[2][1] end
    end
  end
  if not string.find(found.err, 'nknown', 1, true) then return nil, nil, found end
  -- Redis 6.2 has no LMPOP.
  for i = FIRST_LIST, #KEYS do
    local raw = redis.call('RPOP', KEYS[i])
    if raw then return i, raw end
  end
end

-- What is said of a list among KEYS: its queue, and its class where it is one of arrivals.
local function about(i)
  local at = 2 * (i - FIRST_LIST) + 1
  return ARGV[FIRST_QUEUE + string.byte(ARGV[9], at) - 48], tonumber(string.sub(ARGV[9], at + 1, at + 1))
end

-- Pops the message that is next where tenants wait in the queue of the list of arrivals `i`, from which `entry`
-- was popped. Those queues take turns, and so do the queues before it in fetching order.
--
-- Returns  as `share_out`, and the number of the message's list among KEYS, or of another one of its queue
local function pop_shared(i, entry)
  local queue = about(i)
  local base = string.match(KEYS[i], '^(.+)\6\22arrivals\6\22[01]$')
  local arrivals, plain, before, is_before = {}, {}, {}, {['']=true}
  for k = FIRST_LIST, #KEYS do
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
    for k = FIRST_LIST, #KEYS do
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

local who, place = ARGV[6], ARGV[7]
local i, raw, failure = pop()
local list, charge = KEYS[i], nil
for _ = 1, 8 do
  if failure or not i or not select(2, about(i)) then break end
  list, raw, charge, i = pop_shared(i, raw)
  if raw then break end
  if list == 'again' then return {'again'} end
  i, raw, failure = pop()
  list = KEYS[i]
end
if failure then return failure end
if i and not charge and select(2, about(i)) then
  redis.call('RPUSH', KEYS[i], raw)
  return {'again'}
end
if not i then
  if who == '' then return {} end
  return {wait(KEYS[4], who, place, ARGV[8])}
end
if place ~= '' then
  leave(KEYS[4], who, place)
  call_next(KEYS[4])
end
local queue = about(i)
if queue == '' then
  return {i - FIRST_LIST, raw, ''}
end
local cost
local read, tag = pcall(function()
  if #raw > tonumber(ARGV[1]) then return false end
  local message = cjson.decode(raw)
  if charge and type(message.headers) == 'table' then cost = message.headers['smallcat-cost'] end
  return message.properties.delivery_tag
end)
if charge then charge(type(cost) == 'number' and cost >= 1 and cost <= 1e12 and cost or nil) end
local reason = ARGV[5]
local done = false
if read and type(tag) == 'string' and string.find(tag, '^[!-~]+$') then
  done = redis.pcall('ZADD', KEYS[2], 'NX', now(), tag)
  if done == 0 then
    -- Under that tag another message is held, whose place this one would take: it gets a tag of its own.
    local at, to = string.find(raw, '"' .. tag .. '"', 1, true)
    tag = tag .. '#' .. now()
    done = at and redis.pcall('ZADD', KEYS[2], 'NX', now(), tag)
    if done == 1 then
      raw = string.sub(raw, 1, at) .. tag .. string.sub(raw, to)
    elseif not done or done == 0 then
      done, reason = false, 'a worker holds a message of its delivery tag'
    end
  end
end
if not done then
  local head = cjson.encode({at = tonumber(now()), queue = cjson.decode('[' .. queue .. ']')[1],
                             reason = reason, bytes = #raw})
  redis.call('LPUSH', KEYS[3], head .. '\n' .. string.sub(raw, 1, ARGV[4]))
  redis.call('LTRIM', KEYS[3], 0, ARGV[3] - 1)
  redis.call('EXPIRE', KEYS[3], ARGV[2])
  return {i - FIRST_LIST, '', false}
end
if type(done) == 'number' then
  done = redis.pcall('HSET', KEYS[1], tag, '[' .. raw .. ',"",' .. queue .. ']')
end
if type(done) ~= 'number' then
  redis.pcall('ZREM', KEYS[2], tag)
  put('RPUSH', list, raw)
  return done
end
return {i - FIRST_LIST, raw, tag}
