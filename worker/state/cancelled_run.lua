-- Ends a message of a cancelled run without rendering it. A job that somebody else wants, that has ended or is
-- claimed by another message is left to the caller.
--
-- key      the job's record
-- message  the message's id
-- mark     its run mark (`worker.contract.message.RunMark`)
-- Returns  whether the message is dealt with
-- include chains.lua
local function drop_if_run_is_cancelled(key, message, mark)
  local run = string.match(mark, '^(%w+):')
  if not run then return false end
  -- Producers can write a run's key, as another type too.
  if type(redis.pcall('HGET', 'smallcat:run:' .. run, 'cancelled')) ~= 'string' then return false end
  local state, bulk, runs, holder, children = unpack(on(key, 'HMGET', 'state', 'bulk', 'runs', 'claim', 'children'))
  if state and (not bulk or (state ~= 'queued' and holder ~= message)) then return false end
  local marks = mark
  for other in string.gmatch(runs or '', '%S+') do
    if string.match(other, '^(%w+):') ~= run then return false end
    if other ~= mark then marks = marks .. ' ' .. other end
  end
  -- What tells the runs reads the record. None stays: the run may be begun anew, and no record was there.
  redis.call('HSET', key, 'state', 'cancelled', 'error_type', 'JobCancelledError',
             'error', 'Its run was cancelled.')
  mark_runs(marks)
  if children then settle(string.sub(key, 1 + string.len('smallcat:job:')), 'cancelled', TOLD_BY_WORKERS) end
  redis.call('DEL', key)
  return true
end
