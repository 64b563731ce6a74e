-- Lets a held message wait: gives it the score of a message whose lease ends after the delay, so that
-- whichever worker restores expired messages then puts it back into its queue.
--
-- KEYS     the index of held messages, their hash
-- ARGV     tag, delay minus lease in seconds, its entry from now on or ''
-- include ../contract/clock.lua
if redis.call('ZREM', KEYS[1], ARGV[1]) == 1 then
  redis.call('ZADD', KEYS[1], string.format('%.6f', now() + ARGV[2]), ARGV[1])
  if ARGV[3] ~= '' then redis.call('HSET', KEYS[2], ARGV[1], ARGV[3]) end
end
