-- Tells the runs that a final job belongs to: sets the job's bit, and appends an event to the list from which
-- whoever feeds the run reads. A run that is gone, or that never sent the job, is left alone; so is one whose
-- keys are of other types.
--
-- KEYS[1]  the job's record, in its final state
-- runs     run marks (`worker.contract.message.RunMark`), separated by spaces
-- ended    how the job ended, where its record does not say it: the fields below
local function mark_runs(runs, ended)
  if runs == '' then return end
  local r = ended or redis.call('HMGET', KEYS[1], 'state', 'uri', 'timings', 'error_type', 'error', 'cached',
                                'attempts')
  local job_id = string.sub(KEYS[1], 1 + string.len('smallcat:job:'))
  local function mark(run, number, file, line)
    local key = 'smallcat:run:' .. run
    local ttl, fed = unpack(redis.call('HMGET', key, 'ttl', 'fed'))
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
      if not (is_done or has_failed) then redis.call('HINCRBY', key, 'ended', 1) end
      redis.call('RPUSH', key .. ':news', cjson.encode({tonumber(number), tonumber(file), tonumber(line),
                 job_id, r[1], r[2], r[3], r[4], r[5], r[6], r[7]}))
      for _, part in ipairs({'', ':done', ':failed', ':news'}) do redis.call('EXPIRE', key .. part, ttl) end
    end
  end
  for run, number, file, line in string.gmatch(runs, '(%w+):(%d+):(%d+):(%d+):') do
    pcall(mark, run, number, file, line)
  end
end
