-- Pops the next message and registers it as held: both or neither.
--
-- KEYS     hash of held messages, their index, list of unreadable messages, then the lists in fetching order
-- ARGV     bytes of a message at most, seconds that the list of unreadable messages stays, how many it has at
--          most, bytes kept of each, why; then for each of the lists its queue as JSON, or '' where messages
--          are not acknowledged
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
    local queue = ARGV[i + 2]
    if queue == '' then
      return {i - 4, raw, ''}
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
      return {i - 4, '', false}
    end
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
