-- Lists messages whose lease ran out.
--
-- KEYS     the index of held messages, their hash
-- ARGV     the lease in seconds, how many to list at most
-- Returns  {tag, score, entry} for each
-- include ../contract/clock.lua
local ceiling = string.format('%.6f', now() - ARGV[1])
local due = redis.call('ZRANGEBYSCORE', KEYS[1], '-inf', ceiling, 'WITHSCORES', 'LIMIT', 0, ARGV[2])
local found = {}
for i = 1, #due, 2 do
  found[#found + 1] = {due[i], due[i + 1], redis.call('HGET', KEYS[2], due[i])}
end
return found
