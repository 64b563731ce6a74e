-- Gives up a submission, or the whole job. A job that nobody wants any more is cancelled if it is queued; the
-- worker of one that is running is asked to stop it.
--
-- KEYS     the record, the submission
-- ARGV     job id, the workers' channel, submission; '' for the job and all its submissions
-- Returns  the state of the submission, or of the job, after that; '' where nothing is known of the submission;
--          nothing where there is no record
--
-- The submission that goes last stays with a job that is running: it ends as the job ends. Those of a queued job
-- stay cancelled whatever comes: a worker of an earlier version calls a cancelled job done.
-- include go_on.lua
-- include heal.lua
-- include outcome.lua
-- include notify.lua
-- include wanted_by_runs.lua
-- include chains.lua
-- include ../contract/clock.lua
go_on()
local id, channel, submission = unpack(ARGV)
local state, cancel, subs, runs, mine, hooks, waits_for, children =
  unpack(on(KEYS[1], 'HMGET', 'state', 'cancel', 'subs', 'runs', 'sub:' .. submission, 'hooks', 'waits_for',
            'children'))
if not state then return false end
if submission == '' then
  redis.call('HSET', KEYS[1], 'cancelled_at', now())
elseif not mine then
  local text = redis.pcall('GET', KEYS[2])
  -- It has ended: others' jobs are not its own.
  local outcome = string.sub(type(text) == 'string' and text or '', 1, 1)
  return outcome == '-' and 'cancelled' or outcome == '=' and 'done'
    or (outcome == '+' or outcome == '~') and state or ''
elseif (state == 'queued' or state == 'running') and not cancel
    and (count(subs) > 1 or wanted_by_runs(runs or '')) then
  note(KEYS[1], submission, '-')
  redis.call('HDEL', KEYS[1], 'sub:' .. submission)
  redis.call('HSET', KEYS[1], 'subs', math.max(count(subs) - 1, 0))
  redis.call('PUBLISH', KEYS[1], 'cancelled')
  if hooks then notify_submissions(TOLD_BY_PRODUCERS, KEYS[1], 'cancelled', submission) end
  return 'cancelled'
end
if state == 'queued' then
  state = 'cancelled'
  for _, each in ipairs(note_all(KEYS[1], '-')) do redis.call('HDEL', KEYS[1], 'sub:' .. each) end
  redis.call('HSET', KEYS[1], 'subs', 0, 'state', 'cancelled', 'error_type', 'JobCancelledError',
             'error', 'The job was cancelled.')
  -- A run is told by who fetches its message.
  if waits_for then end_waiting(id, (runs or '') ~= '') end
  redis.call('PUBLISH', KEYS[1], 'cancelled')
  redis.call('PUBLISH', channel, 'cancel ' .. id)
  if hooks then notify_submissions(TOLD_BY_PRODUCERS, KEYS[1], 'cancelled') end
  if children then settle(id, 'cancelled', TOLD_BY_PRODUCERS) end
elseif state == 'running' then
  redis.call('HSET', KEYS[1], 'cancel', 1)
  redis.call('PUBLISH', channel, 'cancel ' .. id)
end
return state
