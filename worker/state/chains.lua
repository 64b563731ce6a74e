-- Jobs that begin with the picture of a job that is not done: they wait for it. Such a record is `queued` and
-- says what it waits for, and it keeps the job's messages until they go into their lists.
--
-- Producers can write what it says. So a job waits for, and fails with, those alone that the job itself names;
-- one that is released too early is looked at again by who claims it (`claim.lua`).
--
-- include heal.lua
-- include mark_runs.lua
-- include notify.lua
-- include ../contract/clock.lua
-- include ../contract/put.lua
-- Jobs that wait, as fields of a hash: workers look through them (`settle.lua`).
local WAITING = 'smallcat:job::waiting'
-- Jobs that may wait for one, jobs that may wait for each other in a chain, and jobs that one call settles: the
-- others are settled when a worker looks for them.
local MOST_CHILDREN, MOST_DEEP, SETTLED_AT_ONCE = 1000, 16, 1000
-- Jobs that are looked at to see how deep one is.
local LOOKED_AT = 100
local function record_of(id) return 'smallcat:job:' .. id end
local function children_of(id) return 'smallcat:job:' .. id .. ':children' end
-- Whether a job, as JSON, begins with the picture of another one.
local function names(job, parent)
  return #parent == 32 and string.find(job or '', '"job:' .. parent .. ':', 1, true) ~= nil
end
-- The jobs that a record waits for, by what it says, `waits`, and by its job.
local function waits_of(waits, job)
  local found = {}
  for parent in string.gmatch(waits, '[^ ]+') do
    if names(job, parent) and parent ~= found[1] and #found < 2 then found[#found + 1] = parent end
  end
  return found
end
-- Whether as many jobs as may wait for each other in a chain wait up to this one.
local function is_deep(id)
  local level, looked = {id}, 0
  for _ = 1, MOST_DEEP do
    local above, seen = {}, {}
    for _, each in ipairs(level) do
      local waits, job = unpack(on(record_of(each), 'HMGET', 'waits_for', 'job'))
      for _, parent in ipairs(waits_of(waits or '', job)) do
        if not seen[parent] then above[#above + 1] = parent end
        seen[parent] = true
      end
    end
    looked = looked + #level
    if #above == 0 or looked > LOOKED_AT then return looked > LOOKED_AT end
    level = above
  end
  return true
end
-- What a job has to wait for.
--
-- id       the job
-- parents  ids of the jobs whose pictures it begins with, separated by blanks
-- Returns  those that are not done; or nil and why it is refused
--
-- One that has no record is done long ago: who submits has looked into the bucket.
local function to_wait_for(id, parents)
  local waits = {}
  for parent in string.gmatch(parents, '%x+') do
    local state, cancel, behind = unpack(on(record_of(parent), 'HMGET', 'state', 'cancel', 'waits_for'))
    if state == 'failed' or state == 'cancelled' or cancel and state ~= 'done' then
      return nil, (state == 'failed' and 'failed ' or 'cancelled ') .. parent
    end
    if state == 'queued' or state == 'running' then
      waits[#waits + 1] = parent
      if behind and is_deep(parent) then return nil, 'deep ' .. parent end
      local children = on(children_of(parent), 'HKEYS')
      if #children >= MOST_CHILDREN and redis.call('HEXISTS', children_of(parent), id) == 0 then
        return nil, 'many ' .. parent
      end
    end
  end
  return waits
end
-- Notes that a job waits for others.
local function wait_for(id, parents, ttl)
  for _, parent in ipairs(parents) do
    on(children_of(parent), 'HSET', id, '')
    redis.call('EXPIRE', children_of(parent), ttl)
    redis.call('HSET', record_of(parent), 'children', 1)
  end
  on(WAITING, 'HSET', id, '')
  redis.call('EXPIRE', WAITING, ttl)
end
-- Counts that a message of a run waits no longer. Producers may not add to a field.
local function count_released(run)
  local key = 'smallcat:run:' .. run
  local waiting = redis.pcall('HGET', key, 'waiting')
  if type(waiting) == 'string' then redis.call('HSET', key, 'waiting', math.max(0, count(waiting) - 1)) end
end
-- Ends a job's waiting: forgets its messages, or, where it is `released`, puts them into their lists. False where
-- one could not be put: its list is of another type.
local function end_waiting(id, released)
  local key = record_of(id)
  for _, field in ipairs(redis.call('HKEYS', key)) do
    if string.find(field, '^held:') then
      local list, message = string.match(redis.call('HGET', key, field), '^(smallcat%.[^\n]+)\n(.+)$')
      -- A message of another job is forged.
      local is_own = list and string.find(message, id, 1, true)
      if released and is_own and not pcall(put, 'LPUSH', list, message) then return false end
      redis.call('HDEL', key, field)
      local run = string.match(field, '^held:(%w+):%d+$')
      if run then count_released(run) end
    end
  end
  redis.call('HDEL', key, 'waits_for', 'ttl')
  on(WAITING, 'HDEL', id)
  return true
end
-- The beginning of a text, of whole characters.
local function beginning(text)
  if #text <= 300 then return text end
  return string.gsub(string.sub(text, 1, 300), '[\194-\244]?[\128-\191]*$', '') .. '...'
end
-- What became of a job without which others cannot begin, as the end of a sentence.
local function fate_of(parent, ended)
  local why = on(record_of(parent), 'HGET', 'error') or ''
  if ended == 'gone' then return 'is not known any more.' end
  if ended == 'cancelled' then
    return string.find(why, 'forgotten', 1, true) and 'was forgotten.' or 'was cancelled.'
  end
  -- It waited for another one itself: the first one's reason is the reason.
  local other, its = string.match(why, '^The job begins with the picture of job (%x+), which (.-) Submit that job ')
  if other then return 'failed, because ' .. (string.match(its, '^failed, because (.+)$') or 'job ' .. other .. ' ' .. its) end
  return 'failed: ' .. beginning(why)
end
-- Releases one job. False where its messages cannot be put yet.
local function release(id)
  if not end_waiting(id, true) then return false end
  redis.call('HSET', record_of(id), 'released_at', now())
  redis.call('PUBLISH', record_of(id), 'queued')
  return true
end
-- Adds a job to those that failed for good. False: a producer may not, and a worker does it (`settle.lua`).
local function list_failed(id, ttl)
  local listed = redis.pcall('ZADD', 'smallcat:failed', redis.call('TIME')[1], id)
  if type(listed) ~= 'number' then return false end
  redis.pcall('EXPIRE', 'smallcat:failed', ttl)
  return true
end
-- Releases one job that waits for `parent`, or fails it. Returns whether it has failed.
local function settle_one(id, parent, ended, list)
  if not string.match(id, '^%x+$') or #id ~= 32 then return false end
  local key = record_of(id)
  local state, waits, runs, hooks, children, ttl, job =
    unpack(on(key, 'HMGET', 'state', 'waits_for', 'runs', 'hooks', 'children', 'ttl', 'job'))
  if state ~= 'queued' or not waits then
    on(WAITING, 'HDEL', id)
    return false
  end
  if not names(job, parent) then return false end
  if ended == 'done' then
    local left = {}
    for _, each in ipairs(waits_of(waits, job)) do
      if each ~= parent then left[#left + 1] = each end
    end
    if #left > 0 then redis.call('HSET', key, 'waits_for', table.concat(left, ' ')) else release(id) end
    return false
  end
  -- Only workers may tell runs: they find it.
  if runs and runs ~= '' and list == TOLD_BY_PRODUCERS then return false end
  end_waiting(id, false)
  redis.call('HSET', key, 'state', 'failed', 'error_type', 'InputError', 'error', 'The job begins with the picture of job '
             .. parent .. ', which ' .. fate_of(parent, ended) .. ' Submit that job again, then this one.')
  redis.pcall('EXPIRE', key, ttl)
  if not list_failed(id, ttl) then on(WAITING, 'HSET', id, 'failed') end
  redis.call('PUBLISH', key, 'failed')
  mark_runs(runs or '', nil, key)
  if hooks then notify_submissions(list, key, 'failed') end
  return children
end
-- Settles the jobs that wait for one that has ended, and those that wait for them.
--
-- id     the job that has ended, in its record's final state
-- ended  that state; 'gone' where nobody knows the job
-- list   where webhooks are told (`notify.lua`)
local function settle(id, ended, list)
  local todo, settled = {{id, ended}}, 0
  while #todo > 0 do
    local parent, how = unpack(table.remove(todo))
    for _, child in ipairs(on(children_of(parent), 'HKEYS')) do
      if settled == SETTLED_AT_ONCE then return end
      settled = settled + 1
      if settle_one(child, parent, how, list) then todo[#todo + 1] = {child, 'failed'} end
      redis.call('HDEL', children_of(parent), child)
    end
  end
end
