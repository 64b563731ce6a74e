-- Removes the outcomes that the feeder has written down. Sent twice, it removes them once.
--
-- KEYS     the list of outcomes
-- ARGV     how many were written down, the first of them
if redis.call('LINDEX', KEYS[1], 0) == ARGV[2] then redis.call('LTRIM', KEYS[1], ARGV[1], -1) end
