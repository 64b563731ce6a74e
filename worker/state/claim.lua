-- Gives a job to the worker that holds its message, or says why not.
--
-- KEYS     the record, the job's attempts
-- ARGV     message id, holder, worker, seconds that the claim lasts, attempts at most, seconds until the record
--          expires, job as JSON, queue, delivery, the message's run mark or '', whether the bucket has the
--          picture: 'yes', 'no', or '' while nobody has looked
-- Returns  {verdict, attempt, seconds queued, Redis' time}, without the time where nothing is claimed; the verdict
--          is one of `worker.state.records.Claim`, or 'done' where the record says so and somebody must look
--
-- The claim belongs to a message, not to a worker: the same message delivered again takes it over at once. The
-- holder is one of its copies: each is held under a tag of its own. The same delivery asking again, because the
-- answer was lost with a connection, is one attempt.
-- An attempt counts as a death until it is known how it ended.
-- Producers can write the record. So a claim counts that the job's attempts have, too; a failure that is noted
-- there; and a picture that is in the bucket. The record says the claim and the attempts for those who read it,
-- and for earlier workers, who look there. Attempts that it alone says leave one.
-- include go_on.lua
-- include heal.lua
-- include outcome.lua
-- include mark_runs.lua
-- include cancelled_run.lua
-- include notify.lua
-- include chains.lua
-- include ../contract/clock.lua
local message, me, worker, lease, max_attempts, ttl, job, queue, delivery, run, is_stored = unpack(ARGV)
local time = tonumber(now())
if run ~= '' then go_on() end
if drop_if_run_is_cancelled(KEYS[1], message, run) then
  redis.call('DEL', KEYS[2])
  return {'dropped', 0, 0}
end
local state, cancel, named, named_until, tried, died, submitted_at, runs, cancelled_at, hooks, waits_for,
  released_at, children =
  unpack(on(KEYS[1], 'HMGET', 'state', 'cancel', 'claim', 'claim_until', 'attempts', 'deaths', 'submitted_at',
            'runs', 'cancelled_at', 'hooks', 'waits_for', 'released_at', 'children'))
local holder, until_s, own_tried, own_died, open, failed =
  unpack(on(KEYS[2], 'HMGET', 'claim', 'claim_until', 'attempts', 'deaths', 'open:' .. me, 'failed'))
runs = runs or ''
local fields = {}
local function set(...)
  for _, item in ipairs({...}) do fields[#fields + 1] = item end
end
-- Whether the record's expiry is to be set: it is new, or lives for less than half of its time.
local expires = not state or time - (tonumber(submitted_at or 0) or 0) > ttl / 2
local joins = run ~= '' and not string.find(' ' .. runs .. ' ', ' ' .. run .. ' ', 1, true)
if joins then
  local sent_at = tonumber(string.match(run, ':(%d+)$')) or 0
  if (cancel or state == 'cancelled') and sent_at >= math.floor(tonumber(cancelled_at or 0) or 0) then
    -- Others gave the job up, before they knew of this run, or before it was begun. It starts anew.
    note_all(KEYS[1], '-')
    if hooks then notify_submissions(TOLD_BY_WORKERS, KEYS[1], 'cancelled') end
    redis.call('DEL', KEYS[1])
    state, cancel, named, tried, died, submitted_at, waits_for = false, false, false, false, false, false, false
    if children then set('children', 1) end
    expires = true
  end
end
if state == 'done' and is_stored == '' then return {'done', 0, 0} end
if (state == 'done' and is_stored == 'no') or (state == 'failed' and not failed) then
  -- Forged; or no worker could read another message of the job, and this one can be read.
  redis.call('HDEL', KEYS[1], 'uri', 'cached', 'error', 'error_type')
  set('job', job, 'queue', queue)
  state, expires = 'queued', true
end
if state == 'done' or state == 'failed' or state == 'cancelled' then
  if state == 'cancelled' then redis.call('DEL', KEYS[2]) end
  mark_runs(run)
  -- An earlier worker ended it, or a producer who may tell nobody.
  if hooks then notify_submissions(TOLD_BY_WORKERS, KEYS[1], state) end
  return {'final', 0, 0}
end
if joins then
  runs = runs == '' and run or runs .. ' ' .. run
  set('runs', runs)
end
if cancel then
  go_on()
  set('state', 'cancelled', 'error_type', 'JobCancelledError', 'error', 'The job was cancelled.')
  redis.call('HSET', KEYS[1], unpack(fields))
  redis.call('HDEL', KEYS[1], 'claim', 'claim_until', 'delivery', 'deaths', 'cancel')
  redis.call('DEL', KEYS[2])
  redis.call('PUBLISH', KEYS[1], 'cancelled')
  mark_runs(runs)
  if hooks then notify_submissions(TOLD_BY_WORKERS, KEYS[1], 'cancelled') end
  if children then settle(string.sub(KEYS[1], 1 + string.len('smallcat:job:')), 'cancelled', TOLD_BY_WORKERS) end
  return {'final', 0, 0}
end
if state == 'queued' and waits_for then
  -- A message from before the job was given up: others of it come once what it waits for is done.
  if joins then redis.call('HSET', KEYS[1], unpack(fields)) end
  return {'waiting', 0, 0}
end
-- Whether another message holds the job. An earlier worker's claim is in the record alone, its attempt is not.
local function is_taken()
  if not named or holder == me then return false end
  if holder and (tonumber(until_s or 0) or 0) > time then return true end
  return named ~= message and (tonumber(named_until or 0) or 0) > time
    and redis.call('HEXISTS', KEYS[2], 'open:' .. named) == 1
end
if is_taken() then
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
local own = {'claim', me, 'claim_until', time + lease}
local most = tonumber(max_attempts)
local attempts = math.max(count(own_tried), math.min(count(tried), most - 1))
local verdict = 'render'
if open ~= delivery then
  if attempts >= most then
    verdict = 'poison'
    redis.call('HDEL', KEYS[2], 'open:' .. me)
    redis.call('HDEL', KEYS[1], 'delivery')
  else
    attempts = attempts + 1
    local deaths = math.max(count(own_died), math.min(count(died), most - 1)) + 1
    for _, item in ipairs({'attempts', attempts, 'deaths', deaths, 'open:' .. me, delivery}) do
      own[#own + 1] = item
    end
    set('state', 'running', 'worker', worker, 'step', 0, 'attempts', attempts, 'deaths', deaths,
        'try:' .. attempts, cjson.encode({attempt = attempts, worker = worker, at = time}))
  end
end
if failed then redis.call('HDEL', KEYS[2], 'failed') end
set_first(KEYS[2], unpack(own))
redis.call('EXPIRE', KEYS[2], ttl)
redis.call('HSET', KEYS[1], unpack(fields))
if expires then redis.call('EXPIRE', KEYS[1], ttl) end
return {verdict, attempts, tostring(time - (tonumber(released_at or submitted_at or time) or time)), string.format('%.6f', time)}
