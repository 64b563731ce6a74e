-- Tells the runs that a final job belongs to: sets the job's bit, and appends an event to the list from which
-- whoever feeds the run reads. A run that is gone, or that never sent the job, is left alone; so is one whose
-- keys are of other types.
--
-- KEYS[1]  the job's record, in its final state
-- runs     run marks (`worker.contract.message.RunMark`), separated by spaces
-- ended    how the job ended, where its record does not say it: the fields below
-- key      another record than KEYS[1]
--
-- A run's webhook is told when all its jobs have ended, and, where it was asked for, of each job.
-- include notify.lua
local function mark_runs(runs, ended, key)
  if runs == '' then return end
  local r = ended or redis.call('HMGET', key or KEYS[1], 'state', 'uri', 'timings', 'error_type', 'error',
                                'cached', 'attempts')
  local job_id = string.sub(key or KEYS[1], 1 + string.len('smallcat:job:'))
  local function mark(run, number, file, line)
    local key = 'smallcat:run:' .. run
    local ttl, fed, hook, of_jobs, total, cancelled, rejected, created = unpack(redis.call('HMGET', key, 'ttl',
      'fed', 'webhook', 'webhook_jobs', 'total', 'cancelled', 'rejected', 'created'))
    if ttl and fed and tonumber(number) < tonumber(fed) then
      local is_done = redis.call('GETBIT', key .. ':done', number) == 1
      local has_failed = redis.call('GETBIT', key .. ':failed', number) == 1
      if r[1] == 'done' then
        redis.call('SETBIT', key .. ':done', number, 1)
        redis.call('SETBIT', key .. ':failed', number, 0)
      elseif not is_done then
        redis.call('SETBIT', key .. ':failed', number, 1)
      end
      if not is_done and (has_failed or r[1] == 'cancelled') then
        redis.call('SETBIT', key .. ':cancelled', number, r[1] == 'cancelled' and 1 or 0)
        redis.call('EXPIRE', key .. ':cancelled', ttl)
      end
      local ended = 0
      if not (is_done or has_failed) then ended = redis.call('HINCRBY', key, 'ended', 1) end
      if hook and of_jobs == '1' and not is_done and (r[1] == 'done' or not has_failed) then
        notify(TOLD_BY_WORKERS, table.concat({run, created or '', number, r[1]}, ':'), {run = run,
               number = tonumber(number), file = tonumber(file), line = tonumber(line), job = job_id, hook = hook,
               state = r[1], uri = r[2] or nil, error_type = r[4] or nil, error = r[5] or nil,
               cached = r[6] == 'true' or nil})
      end
      redis.call('RPUSH', key .. ':news', cjson.encode({tonumber(number), tonumber(file), tonumber(line),
                 job_id, r[1], r[2], r[3], r[4], r[5], r[6], r[7]}))
      for _, part in ipairs({'', ':done', ':failed', ':news'}) do redis.call('EXPIRE', key .. part, ttl) end
      if hook and total and not cancelled and ended == tonumber(total) then
        notify_run(TOLD_BY_WORKERS, key, run, hook, 'finished', created, total, rejected)
      end
    end
  end
  for run, number, file, line in string.gmatch(runs, '(%w+):(%d+):(%d+):(%d+):') do
    pcall(mark, run, number, file, line)
  end
end
