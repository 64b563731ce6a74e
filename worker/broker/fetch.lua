-- Pops the next message and registers it as held: both or neither.
--
-- KEYS     hash of held messages, their index, list of unreadable messages, then the lists in fetching order
-- ARGV     for each of those lists its queue as JSON, or '' where messages are not acknowledged
-- Returns  {number of the list from 0, message, delivery tag}; the tag is null for a message that was moved
--          to the list of unreadable ones; {} when all lists are empty
--
-- A delivery tag is printable ASCII without spaces; kombu's is a UUID.
-- The entry's empty exchange makes the queue its routing key: whoever restores it needs no bindings.
-- A full Redis refuses a script's first write if that may take memory, and none after it: so it pops first.
-- include ../contract/clock.lua
for i = 4, #KEYS do
  local raw = redis.call('RPOP', KEYS[i])
  if raw then
    local queue = ARGV[i - 3]
    if queue == '' then
      return {i - 4, raw, ''}
    end
    local read, tag = pcall(function() return cjson.decode(raw).properties.delivery_tag end)
    if not read or type(tag) ~= 'string' or not string.find(tag, '^[!-~]+$') then
      redis.call('LPUSH', KEYS[3], raw)
      return {i - 4, raw, false}
    end
    local done = redis.pcall('ZADD', KEYS[2], now(), tag)
    if type(done) == 'number' then
      done = redis.pcall('HSET', KEYS[1], tag, '[' .. raw .. ',"",' .. queue .. ']')
    end
    if type(done) ~= 'number' then
      redis.pcall('ZREM', KEYS[2], tag)
      redis.call('RPUSH', KEYS[i], raw)
      return done
    end
    return {i - 4, raw, tag}
  end
end
return {}
