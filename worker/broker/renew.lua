-- Renews leases: sets the score of each message to now.
--
-- KEYS     the index of held messages
-- ARGV     delivery tags
-- Returns  the tags that are no longer in the index
--
-- A full Redis refuses a script's first write if that may take memory, and none after it: so it removes first.
-- include ../contract/clock.lua
local time = now()
local lost = {}
for _, tag in ipairs(ARGV) do
  if redis.call('ZREM', KEYS[1], tag) == 1 then
    redis.call('ZADD', KEYS[1], time, tag)
  else
    lost[#lost + 1] = tag
  end
end
return lost
