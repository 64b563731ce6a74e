-- Gives a job to the worker that holds its message, or says why not.
--
-- KEYS     the record
-- ARGV     message id, worker, seconds that the claim lasts, attempts at most, seconds until the record
--          expires, job as JSON, queue, delivery, the message's run mark or ''
-- Returns  {verdict, attempt, seconds queued}; the verdict is one of `worker.state.records.Claim`
--
-- The claim belongs to a message, not to a worker: the same message delivered again takes it over at once.
-- The same delivery asking again, because the answer was lost with a connection, is one attempt.
-- An attempt counts as a death until it is known how it ended.
-- include go_on.lua
-- include mark_runs.lua
-- include ../contract/clock.lua
local message, worker, lease, max_attempts, ttl, job, queue, delivery, run = unpack(ARGV)
local time = tonumber(now())
local function get(field) return redis.call('HGET', KEYS[1], field) end
local state = get('state')
if state == 'done' or state == 'failed' or state == 'cancelled' then
  mark_runs(run)
  return {'final', 0, 0}
end
if run ~= '' then
  local runs = get('runs') or ''
  if not string.find(' ' .. runs .. ' ', ' ' .. run .. ' ', 1, true) then
    redis.call('HSET', KEYS[1], 'runs', runs == '' and run or runs .. ' ' .. run)
  end
end
if get('cancel') then
  redis.call('HSET', KEYS[1], 'state', 'cancelled', 'error_type', 'JobCancelledError',
             'error', 'The job was cancelled.')
  redis.call('HDEL', KEYS[1], 'claim', 'claim_until', 'delivery', 'deaths', 'cancel')
  redis.call('PUBLISH', KEYS[1], 'cancelled')
  mark_runs(get('runs') or '')
  return {'final', 0, 0}
end
local holder = get('claim')
if holder and holder ~= message and tonumber(get('claim_until')) > time then return {'taken', 0, 0} end
local attempts = tonumber(get('attempts') or 0)
local verdict = 'render'
if not state then
  -- A job of a run has no record before; its message says when it was sent.
  redis.call('HSET', KEYS[1], 'job', job, 'queue', queue, 'submitted_at', string.match(run, ':(%d+)$') or time)
  if run ~= '' then redis.call('HSET', KEYS[1], 'bulk', 1) end
end
redis.call('HSET', KEYS[1], 'claim', message, 'claim_until', time + lease)
redis.call('EXPIRE', KEYS[1], ttl)
if get('delivery') ~= delivery then
  if attempts >= tonumber(max_attempts) then
    verdict = 'poison'
    redis.call('HDEL', KEYS[1], 'delivery')
  else
    attempts = redis.call('HINCRBY', KEYS[1], 'attempts', 1)
    redis.call('HINCRBY', KEYS[1], 'deaths', 1)
    redis.call('HSET', KEYS[1], 'delivery', delivery, 'state', 'running', 'worker', worker, 'step', 0,
               'try:' .. attempts, cjson.encode({attempt = attempts, worker = worker, at = time}))
    redis.call('PUBLISH', KEYS[1], 'running')
  end
end
return {verdict, attempts, tostring(time - tonumber(get('submitted_at')))}
