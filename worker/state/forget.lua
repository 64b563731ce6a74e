-- Forgets a job, and leaves a mark that ends what is still under way of it: whoever fetches a message of it, or
-- renders it, finds the job cancelled. It can be submitted anew.
--
-- KEYS     the record, the job's attempts, the failed jobs, the latest jobs of all, those of its tenant, its
--          tenant's jobs that were done last
-- ARGV     job id, tenant, seconds that the mark stays, the workers' channel, what it is forgotten for
-- Returns  until when a worker may be working on it, in Unix seconds as text; '0': no worker is
-- include heal.lua
-- include mark_runs.lua
-- include chains.lua
-- include ../contract/clock.lua
local id, tenant, ttl, channel, scope = unpack(ARGV)
local time = now()
local state, runs, forgotten = unpack(on(KEYS[1], 'HMGET', 'state', 'runs', 'forgotten'))
local until_s = tonumber(on(KEYS[2], 'HGET', 'claim_until') or 0) or 0
if not forgotten then
  local mark = {'state', 'cancelled', 'error_type', 'JobCancelledError', 'error', 'The job was forgotten.'}
  local is_under_way = state == 'queued' or state == 'running'
  if is_under_way then
    redis.call('HSET', KEYS[1], unpack(mark))
    mark_runs(runs or '')
  end
  end_waiting(id, false)
  redis.call('DEL', KEYS[1])
  redis.call('HSET', KEYS[1], 'forgotten', scope, 'of', tenant, 'cancelled_at', time, unpack(mark))
  redis.call('EXPIRE', KEYS[1], ttl)
  settle(id, 'cancelled', TOLD_BY_WORKERS)
  on(KEYS[3], 'ZREM', id)
  on(KEYS[4], 'ZREM', id, tenant .. '/' .. id)
  on(KEYS[5], 'ZREM', id)
  on(KEYS[6], 'ZREM', id)
  if is_under_way then
    redis.call('PUBLISH', KEYS[1], 'cancelled')
    redis.call('PUBLISH', channel, 'cancel ' .. id)
  end
end
if until_s > tonumber(time) then return string.format('%.6f', until_s) end
redis.call('DEL', KEYS[2])
return '0'
