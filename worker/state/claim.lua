-- Gives a job to the worker that holds its message, or says why not.
--
-- KEYS     the record, the job's attempts
-- ARGV     message id, worker, seconds that the claim lasts, attempts at most, seconds until the record
--          expires, job as JSON, queue, delivery, the message's run mark or ''
-- Returns  {verdict, attempt, seconds queued}; the verdict is one of `worker.state.records.Claim`
--
-- The claim belongs to a message, not to a worker: the same message delivered again takes it over at once.
-- The same delivery asking again, because the answer was lost with a connection, is one attempt.
-- An attempt counts as a death until it is known how it ended.
-- The record says the attempts, too, for those who read it and for earlier workers, who count there. Producers
-- can write it: what it alone says leaves one attempt.
-- include go_on.lua
-- include heal.lua
-- include outcome.lua
-- include mark_runs.lua
-- include cancelled_run.lua
-- include ../contract/clock.lua
local message, worker, lease, max_attempts, ttl, job, queue, delivery, run = unpack(ARGV)
local time = tonumber(now())
if drop_if_run_is_cancelled(KEYS[1], message, run) then
  redis.call('DEL', KEYS[2])
  return {'final', 0, 0}
end
local state, cancel, holder, until_s, tried, died, submitted_at, runs, cancelled_at =
  unpack(on(KEYS[1], 'HMGET', 'state', 'cancel', 'claim', 'claim_until', 'attempts', 'deaths', 'submitted_at',
            'runs', 'cancelled_at'))
runs = runs or ''
local fields = {}
local function set(...)
  for _, item in ipairs({...}) do fields[#fields + 1] = item end
end
local joins = run ~= '' and not string.find(' ' .. runs .. ' ', ' ' .. run .. ' ', 1, true)
if joins then
  local sent_at = tonumber(string.match(run, ':(%d+)$')) or 0
  if (cancel or state == 'cancelled') and sent_at >= math.floor(tonumber(cancelled_at or 0) or 0) then
    -- Others gave the job up, before they knew of this run, or before it was begun. It starts anew.
    note_all(KEYS[1], '-')
    redis.call('DEL', KEYS[1])
    state, cancel, holder, tried, died, submitted_at = false, false, false, false, false, false
  end
end
if state == 'done' or state == 'failed' or state == 'cancelled' then
  if state == 'cancelled' then redis.call('DEL', KEYS[2]) end
  mark_runs(run)
  return {'final', 0, 0}
end
if joins then
  runs = runs == '' and run or runs .. ' ' .. run
  set('runs', runs)
end
if cancel then
  set('state', 'cancelled', 'error_type', 'JobCancelledError', 'error', 'The job was cancelled.')
  redis.call('HSET', KEYS[1], unpack(fields))
  redis.call('HDEL', KEYS[1], 'claim', 'claim_until', 'delivery', 'deaths', 'cancel')
  redis.call('DEL', KEYS[2])
  redis.call('PUBLISH', KEYS[1], 'cancelled')
  mark_runs(runs)
  return {'final', 0, 0}
end
if holder and holder ~= message and (tonumber(until_s or 0) or 0) > time then
  if joins then redis.call('HSET', KEYS[1], unpack(fields)) end
  return {'taken', 0, 0}
end
if not state then
  -- A job of a run has no record before; its message says when it was sent.
  submitted_at = string.match(run, ':(%d+)$') or tostring(time)
  set('job', job, 'queue', queue, 'submitted_at', submitted_at)
  if run ~= '' then set('bulk', 1) end
end
set('claim', message, 'claim_until', time + lease)
local own_tried, own_died, open = unpack(on(KEYS[2], 'HMGET', 'attempts', 'deaths', 'open:' .. message))
local most = tonumber(max_attempts)
local attempts = math.max(count(own_tried), math.min(count(tried), most - 1))
local verdict = 'render'
if open ~= delivery then
  if attempts >= most then
    verdict = 'poison'
    redis.call('HDEL', KEYS[2], 'open:' .. message)
    redis.call('HDEL', KEYS[1], 'delivery')
  else
    attempts = attempts + 1
    local deaths = math.max(count(own_died), math.min(count(died), most - 1)) + 1
    redis.call('HSET', KEYS[2], 'attempts', attempts, 'deaths', deaths, 'open:' .. message, delivery)
    redis.call('EXPIRE', KEYS[2], ttl)
    set('state', 'running', 'worker', worker, 'step', 0, 'attempts', attempts, 'deaths', deaths,
        'try:' .. attempts, cjson.encode({attempt = attempts, worker = worker, at = time}))
    redis.call('PUBLISH', KEYS[1], 'running')
  end
end
redis.call('HSET', KEYS[1], unpack(fields))
redis.call('EXPIRE', KEYS[1], ttl)
return {verdict, attempts, tostring(time - (tonumber(submitted_at or time) or time))}
