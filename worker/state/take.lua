-- Makes a process the feeder of a run, or keeps it the feeder.
--
-- KEYS     the run's feeder
-- ARGV     a token that may be replaced, the process' own token, seconds that it lives
-- Returns  the token of the run's feeder
local holder = redis.call('GET', KEYS[1])
if not holder or holder == ARGV[1] or holder == ARGV[2] then
  redis.call('SET', KEYS[1], ARGV[2], 'EX', ARGV[3])
  return ARGV[2]
end
return holder
