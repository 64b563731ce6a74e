-- Moves a held message to the list of those that no worker can read, once.
--
-- KEYS     the index of held messages, their hash, the list
-- ARGV     tag, the score that it must still have or '', the entry, seconds that the list stays, how many
--          entries it has at most
-- Returns  1 when it was moved, 0 when nobody holds it or the score has changed
if ARGV[2] ~= '' and redis.call('ZSCORE', KEYS[1], ARGV[1]) ~= ARGV[2] then
  return 0
end
redis.call('ZREM', KEYS[1], ARGV[1])
if redis.call('HDEL', KEYS[2], ARGV[1]) == 0 then
  return 0
end
redis.call('LPUSH', KEYS[3], ARGV[3])
redis.call('LTRIM', KEYS[3], 0, ARGV[5] - 1)
redis.call('EXPIRE', KEYS[3], ARGV[4])
return 1
