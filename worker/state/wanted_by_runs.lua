-- Whether a run of prompt files wants a job: it has sent it, was not cancelled, and the job has not ended for it.
--
-- runs     run marks (`worker.contract.message.RunMark`), separated by spaces
local function wanted_by_runs(runs)
  for run, number in string.gmatch(runs, '(%w+):(%d+):%d+:%d+:%d+') do
    local key = 'smallcat:run:' .. run
    local read, wanted = pcall(function()
      local fed, cancelled = unpack(redis.call('HMGET', key, 'fed', 'cancelled'))
      return fed and not cancelled and tonumber(number) < tonumber(fed)
        and redis.call('GETBIT', key .. ':done', number) + redis.call('GETBIT', key .. ':failed', number) == 0
    end)
    if read and wanted then return true end
  end
  return false
end
