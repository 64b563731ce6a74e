-- Pops the next message and registers it as held: both or neither.
--
-- KEYS     hash of held messages, their index, list of unreadable messages, the room of those who wait for
--          messages in the same lists, then the lists in fetching order
-- ARGV     bytes of a message at most, seconds that the list of unreadable messages stays, how many it has at
--          most, bytes kept of each, why; who waits when there is no message, or '', its place in the room,
--          milliseconds that a place lasts; then for each of the lists its queue as JSON, or '' where messages
--          are not acknowledged
-- Returns  {number of the list from 0, message, delivery tag}; the tag is null for a message that was moved
--          to the list of unreadable ones; when all lists are empty {place in the room}, or {} for who does not
--          wait
--
-- A delivery tag is printable ASCII without spaces; kombu's is a UUID.
-- The entry's empty exchange makes the queue its routing key: whoever restores it needs no bindings.
-- A full Redis refuses a script's first write if that may take memory, and none after it: so it pops first.
-- include ../contract/clock.lua
-- include waiting_room.lua
local FIRST_LIST, FIRST_QUEUE = 5, 9

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

local who, place = ARGV[6], ARGV[7]
local i, raw, failure = pop()
if failure then return failure end
if not i then
  if who == '' then return {} end
  return {wait(KEYS[4], who, place, ARGV[8])}
end
if place ~= '' then
  leave(KEYS[4], who, place)
  call_next(KEYS[4])
end
local queue = ARGV[i - FIRST_LIST + FIRST_QUEUE]
if queue == '' then
  return {i - FIRST_LIST, raw, ''}
end
local read, tag = pcall(function()
  return #raw <= tonumber(ARGV[1]) and cjson.decode(raw).properties.delivery_tag
end)
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
  redis.call('RPUSH', KEYS[i], raw)
  return done
end
return {i - FIRST_LIST, raw, tag}
