-- Looks at some of the jobs that wait for others, and settles those whose parents have ended: an earlier worker
-- ended them, or there were too many for one call.
--
-- KEYS     the jobs that wait
-- ARGV     where to go on, how many jobs to look at, then what is known of parents that have no record: job,
--          parent, and 'done' or 'gone' in turn
-- Returns  where to go on, '0' at the end; how many jobs were settled; then job and parent in turn, for each parent
--          that has no record
-- include go_on.lua
-- include chains.lua
-- include wanted_by_runs.lua
go_on()
local cursor, most = ARGV[1], ARGV[2]
local known = {}
for i = 3, #ARGV, 3 do known[ARGV[i] .. ARGV[i + 1]] = ARGV[i + 2] end
local found = on(KEYS[1], 'HSCAN', cursor, 'COUNT', most)
local result, settled = {found[1], 0}, 0
-- A job that waits outlives the time that records live, and so does what it waits for.
local function refresh(id, parent, ttl)
  if ttl == 0 or redis.call('TTL', record_of(id)) > ttl / 2 then return end
  for _, key in ipairs({record_of(id), record_of(parent), children_of(parent), KEYS[1]}) do
    if redis.call('TTL', key) < ttl then redis.call('EXPIRE', key, ttl) end
  end
end
-- Ends a job that only runs have sent, all of which were cancelled. No record stays: they may be begun anew.
local function drop(id, runs, children)
  local key = record_of(id)
  end_waiting(id, false)
  redis.call('HSET', key, 'state', 'cancelled', 'error_type', 'JobCancelledError', 'error', 'Its run was cancelled.')
  redis.call('PUBLISH', key, 'cancelled')
  mark_runs(runs, nil, key)
  if children then settle(id, 'cancelled', TOLD_BY_WORKERS) end
  redis.call('DEL', key)
end
local function look_at(id)
  local state, waits, ttl, job, bulk, runs, children =
    unpack(on(record_of(id), 'HMGET', 'state', 'waits_for', 'ttl', 'job', 'bulk', 'runs', 'children'))
  if state ~= 'queued' or not waits then
    if state == 'failed' and redis.call('HGET', KEYS[1], id) == 'failed' then
      list_failed(id, redis.call('TTL', record_of(id)))
    end
    redis.call('HDEL', KEYS[1], id)
    return
  end
  local parents = waits_of(waits, job)
  if bulk and runs and not wanted_by_runs(runs) then
    settled = settled + 1
    for _, parent in ipairs(parents) do on(children_of(parent), 'HDEL', id) end
    return drop(id, runs, children)
  end
  -- Forged: its messages say what it begins with.
  if #parents == 0 then release(id) end
  for _, parent in ipairs(parents) do
    local ended = on(record_of(parent), 'HGET', 'state') or known[id .. parent]
    if not ended then
      result[#result + 1] = id
      result[#result + 1] = parent
    elseif ended ~= 'queued' and ended ~= 'running' then
      settled = settled + 1
      if settle_one(id, parent, ended, TOLD_BY_WORKERS) then settle(id, 'failed', TOLD_BY_WORKERS) end
      on(children_of(parent), 'HDEL', id)
    else
      refresh(id, parent, count(ttl))
    end
  end
end
if #ARGV > 2 then
  for i = 3, #ARGV, 3 do look_at(ARGV[i]) end
else
  for i = 1, #found[2], 2 do look_at(found[2][i]) end
end
result[2] = settled
return result
