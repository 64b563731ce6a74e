-- Lets a job of a run wait for the jobs whose pictures it begins with. Its message goes into its record, which
-- is made where there is none, and into its list as soon as those are done (`chains.lua`). One that has failed or
-- was cancelled is waited for as well: a worker finds that, and tells the run why the job fails.
--
-- list, message  where the message belongs, and the message
-- id, job        the job's id, and the job as JSON
-- queue          its queue
-- mark           its run mark (`worker.contract.message.RunMark`)
-- parents        ids of the jobs whose pictures it begins with, separated by blanks
-- ttl            seconds that its record lives
-- Returns        false where the message belongs into its list: it need not wait, or too many wait for each other
--                in a chain, or another message of the job says what becomes of it. A worker that fetches it too
--                early lets it come back.
-- include chains.lua
local function hold(list, message, id, job, queue, mark, parents, ttl)
  local key, waits = record_of(id), {}
  local state, waits_for, runs = unpack(on(key, 'HMGET', 'state', 'waits_for', 'runs'))
  if state and not (state == 'queued' and waits_for) then return false end
  for parent in string.gmatch(parents, '%x+') do
    local its, behind = unpack(on(record_of(parent), 'HMGET', 'state', 'waits_for'))
    -- One that has no record is done long ago: who feeds the run has looked into the bucket.
    if its and its ~= 'done' then
      if behind and is_deep(parent) then return false end
      waits[#waits + 1] = parent
    end
  end
  if #waits == 0 then return false end
  local run, number, sent_at = string.match(mark, '^(%w+):(%d+):.*:(%d+)$')
  wait_for(id, waits, ttl)
  local marks = mark
  for other in string.gmatch(runs or '', '%S+') do
    -- The run may have been cancelled and begun anew meanwhile.
    if string.match(other, '^%w+:%d+:') ~= run .. ':' .. number .. ':' then marks = marks .. ' ' .. other end
  end
  if not state then
    redis.call('HSET', key, 'state', 'queued', 'job', job, 'queue', queue, 'submitted_at', sent_at, 'bulk', 1)
  end
  redis.call('HSET', key, 'runs', marks, 'waits_for', table.concat(waits, ' '), 'ttl', ttl,
             'held:' .. run .. ':' .. number, list .. '\n' .. message)
  redis.call('EXPIRE', key, ttl)
  return true
end
