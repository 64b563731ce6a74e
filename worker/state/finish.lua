-- Writes a job's final state, once.
--
-- KEYS     the record, the failed jobs
-- ARGV     state, seconds until the record expires, message id, job id, then field and value in turn
-- Returns  1 when it was written, 0 when it was not
--
-- A picture is done whoever made it. A failure counts only from the message that holds the claim, so that a
-- job that was cancelled and submitted again is not cancelled twice.
-- include go_on.lua
-- include mark_runs.lua
-- Seconds that the record stays of a job that only a run has sent: the lasting record is in the bucket, and a
-- run of a million jobs must not leave a million records here.
local BULK_TTL_S = 60
local final, ttl, message, id = unpack(ARGV, 1, 4)
local state = redis.call('HGET', KEYS[1], 'state')
if state == 'done' or state == final then return 0 end
if final ~= 'done' and redis.call('HGET', KEYS[1], 'claim') ~= message then return 0 end
for i = 5, #ARGV, 2 do redis.call('HSET', KEYS[1], ARGV[i], ARGV[i + 1]) end
redis.call('HSET', KEYS[1], 'state', final)
redis.call('HDEL', KEYS[1], 'claim', 'claim_until', 'delivery', 'deaths', 'cancel')
if final == 'done' then redis.call('HDEL', KEYS[1], 'error', 'error_type') end
redis.call('EXPIRE', KEYS[1], ttl)
if final == 'failed' then
  redis.call('ZADD', KEYS[2], redis.call('TIME')[1], id)
  redis.call('EXPIRE', KEYS[2], ttl)
else
  redis.call('ZREM', KEYS[2], id)
end
redis.call('PUBLISH', KEYS[1], final)
mark_runs(redis.call('HGET', KEYS[1], 'runs') or '')
if final == 'done' and redis.call('HEXISTS', KEYS[1], 'bulk') == 1 then
  redis.call('EXPIRE', KEYS[1], math.min(ttl, BULK_TTL_S))
end
return 1
