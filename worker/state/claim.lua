-- Gives a job to the worker that holds its message, or says why not.
--
-- KEYS     the record, the job's attempts
-- ARGV     message id, holder, worker, seconds that the claim lasts, attempts at most, seconds until the record
--          expires, job as JSON, queue, delivery, the message's run mark or '', whether the bucket has the
--          picture: 'yes', 'no', or '' while nobody has looked, ids of the jobs whose pictures it begins with and
--          that the bucket may not have, separated by blanks
-- Returns  {verdict, attempt, since when it was queued, Redis' time in seconds and microseconds}, the verdict alone
--          where nothing is claimed, and after 'waiting' the ids of what it waits for; it is one of
--          `worker.state.records.Claim`, or 'done' where the record says so and somebody must look
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
-- include ../contract/clock.lua
local message, me, worker, lease, max_attempts, ttl, job, queue, delivery, run, is_stored, parents = unpack(ARGV)
local at = redis.call('TIME')
local time = at[1] + at[2] / 1000000
local is_run_cancelled = false
if run ~= '' then
  go_on()
  -- Producers can write a run's key, as another type too.
  local cancelled = redis.pcall('HGET', 'smallcat:run:' .. (string.match(run, '^%w+') or ''), 'cancelled')
  is_run_cancelled = type(cancelled) == 'string'
end
local state, cancel, named, tried, died, submitted_at, runs, waits_for, released_at =
  unpack(on(KEYS[1], 'HMGET', 'state', 'cancel', 'claim', 'attempts', 'deaths', 'submitted_at', 'runs', 'waits_for',
            'released_at'))
local holder, own_tried, own_died, open, failed =
  unpack(on(KEYS[2], 'HMGET', 'claim', 'attempts', 'deaths', 'open:' .. me, 'failed'))
runs = runs or ''
local fields = {}
local function set(name, value)
  fields[#fields + 1] = name
  fields[#fields + 1] = value
end
-- Whether the record's expiry is to be set: it is new, or lives for less than half of its time.
local expires = not state or time - (tonumber(submitted_at or 0) or 0) > ttl / 2
local joins = run ~= '' and not string.find(' ' .. runs .. ' ', ' ' .. run .. ' ', 1, true)
if is_run_cancelled or cancel or state and state ~= 'queued' and state ~= 'running' then
  -- include outcome.lua
  -- include mark_runs.lua
  -- include cancelled_run.lua
  -- include notify.lua
  -- include chains.lua
  if is_run_cancelled and drop_if_run_is_cancelled(KEYS[1], message, run) then
    redis.call('DEL', KEYS[2])
    return {'dropped'}
  end
  local cancelled_at, hooks, children = unpack(redis.call('HMGET', KEYS[1], 'cancelled_at', 'hooks', 'children'))
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
  if state == 'done' and is_stored == '' then return {'done'} end
  if (state == 'done' and is_stored == 'no') or (state == 'failed' and not failed) then
    -- Forged; or no worker could read another message of the job, and this one can be read.
    redis.call('HDEL', KEYS[1], 'uri', 'cached', 'warnings', 'error', 'error_type')
    set('job', job)
    set('queue', queue)
    state, expires = 'queued', true
  end
  if state == 'done' or state == 'failed' or state == 'cancelled' then
    if state == 'cancelled' then redis.call('DEL', KEYS[2]) end
    mark_runs(run)
    -- An earlier worker ended it, or a producer who may tell nobody.
    if hooks then notify_submissions(TOLD_BY_WORKERS, KEYS[1], state) end
    return {'final'}
  end
  if cancel then
    if joins then
      runs = runs == '' and run or runs .. ' ' .. run
      set('runs', runs)
    end
    go_on()
    set('state', 'cancelled')
    set('error_type', 'JobCancelledError')
    set('error', 'The job was cancelled.')
    redis.call('HSET', KEYS[1], unpack(fields))
    redis.call('HDEL', KEYS[1], 'claim', 'claim_until', 'delivery', 'deaths', 'cancel')
    redis.call('DEL', KEYS[2])
    redis.call('PUBLISH', KEYS[1], 'cancelled')
    mark_runs(runs)
    if hooks then notify_submissions(TOLD_BY_WORKERS, KEYS[1], 'cancelled') end
    if children then settle(string.sub(KEYS[1], 1 + string.len('smallcat:job:')), 'cancelled', TOLD_BY_WORKERS) end
    return {'final'}
  end
end
if joins then set('runs', runs == '' and run or runs .. ' ' .. run) end
if parents ~= '' and (not state or state == 'queued') then
  -- The message comes back: it does not count on the record, which may have another one of the job, or not.
  local pending = {'waiting'}
  for parent in string.gmatch(parents, '%x+') do
    local its = on('smallcat:job:' .. parent, 'HGET', 'state')
    if its == 'queued' or its == 'running' then pending[#pending + 1] = parent end
  end
  if #pending > 1 then
    if joins and state then redis.call('HSET', KEYS[1], unpack(fields)) end
    return pending
  end
end
if state == 'queued' and waits_for then
  -- Forged, or what it waited for was done by an earlier worker. The record's own messages come, too.
  -- include chains.lua
  end_waiting(string.sub(KEYS[1], 1 + string.len('smallcat:job:')), true)
end
-- Whether another message holds the job. An earlier worker's claim is in the record alone, its attempt is not.
local function is_taken()
  local function is_over(key) return (tonumber(redis.call('HGET', key, 'claim_until') or 0) or 0) <= time end
  if holder and not is_over(KEYS[2]) then return true end
  return named ~= message and not is_over(KEYS[1]) and redis.call('HEXISTS', KEYS[2], 'open:' .. named) == 1
end
if named and holder ~= me and is_taken() then
  if joins then redis.call('HSET', KEYS[1], unpack(fields)) end
  return {'taken'}
end
if not state then
  -- A job of a run has no record before; its message says when it was sent.
  submitted_at = string.match(run, ':(%d+)$') or text_of(at)
  set('job', job)
  set('queue', queue)
  set('submitted_at', submitted_at)
  if run ~= '' then set('bulk', 1) end
end
local until_s = time + lease
local most = tonumber(max_attempts)
local attempts = math.max(count(own_tried), math.min(count(tried), most - 1))
local verdict = 'render'
if open ~= delivery and attempts < most then
  attempts = attempts + 1
  local deaths = math.max(count(own_died), math.min(count(died), most - 1)) + 1
  set_first(KEYS[2], 'claim', me, 'claim_until', until_s, 'attempts', attempts, 'deaths', deaths, 'open:' .. me, delivery)
  local number = tostring(attempts)
  redis.call('HSET', KEYS[1], 'claim', message, 'claim_until', until_s, 'state', 'running', 'worker', worker, 'step', 0,
             'attempts', number, 'deaths', deaths, 'try:' .. number,
             '{"attempt":' .. number .. ',"worker":' .. cjson.encode(worker) .. ',"at":' .. text_of(at) .. '}',
             unpack(fields))
else
  if open ~= delivery then
    verdict = 'poison'
    redis.call('HDEL', KEYS[2], 'open:' .. me)
    redis.call('HDEL', KEYS[1], 'delivery')
  end
  set_first(KEYS[2], 'claim', me, 'claim_until', until_s)
  redis.call('HSET', KEYS[1], 'claim', message, 'claim_until', until_s, unpack(fields))
end
if failed then redis.call('HDEL', KEYS[2], 'failed') end
redis.call('EXPIRE', KEYS[2], ttl)
if expires then redis.call('EXPIRE', KEYS[1], ttl) end
return {verdict, attempts, released_at or submitted_at, at[1], at[2]}
