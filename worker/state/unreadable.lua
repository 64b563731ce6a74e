-- Fails a job whose message no worker can read, if that message is the only one that its record knows, and no
-- worker has ever had the job: so that a forged message fails nobody's job.
--
-- KEYS     the record, the failed jobs
-- ARGV     message id, job id, seconds that the record stays, class of the error, its text
-- Returns  1 when the job was failed
-- include go_on.lua
-- include heal.lua
-- include mark_runs.lua
local message, id, ttl, kind, text = unpack(ARGV)
local state, known, worker, runs = unpack(on(KEYS[1], 'HMGET', 'state', 'message', 'worker', 'runs'))
if state ~= 'queued' or known ~= message or worker then return 0 end
redis.call('HSET', KEYS[1], 'state', 'failed', 'error_type', kind, 'error', text)
redis.call('EXPIRE', KEYS[1], ttl)
on(KEYS[2], 'ZADD', redis.call('TIME')[1], id)
redis.call('EXPIRE', KEYS[2], ttl)
redis.call('PUBLISH', KEYS[1], 'failed')
mark_runs(runs or '')
return 1
