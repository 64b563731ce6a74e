-- Moves a held message into lists, once.
--
-- KEYS     the index of held messages, their hash, then the lists
-- ARGV     tag, the score that it must still have or '', LPUSH or RPUSH, the message
-- Returns  1 when it was moved, 0 when nobody holds it or the score has changed
--
-- include ../contract/put.lua
-- A worker that renews its lease after the message was found expired has changed the score.
if ARGV[2] ~= '' and redis.call('ZSCORE', KEYS[1], ARGV[1]) ~= ARGV[2] then
  return 0
end
redis.call('ZREM', KEYS[1], ARGV[1])
if redis.call('HDEL', KEYS[2], ARGV[1]) == 0 then
  return 0
end
for i = 3, #KEYS do
  put(ARGV[3], KEYS[i], ARGV[4])
end
return 1
