-- Writes the record of a job that is submitted. A job that is queued or running stays as it is, unless it was
-- cancelled; any other starts anew, and still belongs to its runs.
--
-- KEYS     the record, the queues, the failed jobs
-- ARGV     job as JSON, queue, seconds until the record expires, job id
--
-- Its first write may take memory: a full Redis refuses the script before it has done anything.
-- include ../contract/clock.lua
local job, queue, ttl, id = unpack(ARGV)
redis.call('SADD', KEYS[2], queue)
redis.call('EXPIRE', KEYS[2], ttl)
local state = redis.call('HGET', KEYS[1], 'state')
if state ~= 'queued' and state ~= 'running' or redis.call('HEXISTS', KEYS[1], 'cancel') == 1 then
  local runs = redis.call('HGET', KEYS[1], 'runs')
  redis.call('DEL', KEYS[1])
  if runs then redis.call('HSET', KEYS[1], 'runs', runs) end
  redis.call('HSET', KEYS[1], 'state', 'queued', 'job', job, 'queue', queue, 'submitted_at', now())
end
redis.call('HDEL', KEYS[1], 'bulk')
redis.call('EXPIRE', KEYS[1], ttl)
redis.call('ZREM', KEYS[3], id)
