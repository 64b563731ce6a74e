-- Admits jobs of a tenant within what it may have queued, and within what it may submit in a day; counts them.
--
-- KEYS     the tenant's counters, its open jobs, its runs; the note of an earlier try of this request or ''
-- ARGV     jobs that may be open or '', pixel steps that may be submitted in a day or '', seconds that the
--          keys live, the run or '', the number of the first job in it, 1 where it is all or nothing, seconds
--          that the note lives, then for each job its id, its pixel steps, and the jobs whose pictures it
--          begins with, separated by blanks
-- Returns  {jobs admitted, jobs open before, pixel steps submitted today before, seconds until the day ends,
--          what stopped it: 'queued', 'day' or ''}
--
-- Open jobs are scored by when they are to be looked at: a job that has ended is open no longer, nor one without
-- a record, some time after it was admitted. So whatever becomes of a job, it leaves. Those of runs have no
-- records at first: a run counts what it was admitted for, less what has ended.
-- Jobs that wait for others' pictures are not open: they are counted apart, as many at most, until they wait no
-- longer.
-- The work of a request that is tried again, and a window of a run that is sent again, are counted once: what was
-- counted is noted with the request, and with the run.
-- include heal.lua
-- include ../contract/clock.lua
local most_open, most_work, ttl, run, first, is_whole, note_ttl = unpack(ARGV, 1, 7)
local HEAD, AT_ONCE = 7, 10000
-- Seconds for which a job that was admitted may have no record yet; until one that was found open is looked at.
local NEW_S, AGAIN_S = 30, 1
local time = tonumber(now())
local today = string.format('%d', math.floor(time / 86400))
first = tonumber(first)
local asked = (#ARGV - HEAD) / 3
local waiting_key = KEYS[2] .. ':waiting'
local noted = 0
if run ~= '' then noted = math.max(0, (tonumber(on(KEYS[3], 'HGET', run) or 0) or 0) - first)
elseif KEYS[4] then noted = tonumber(on(KEYS[4], 'GET') or 0) or 0 end
noted = math.min(noted, asked)

local function open_in_runs()
  local open, fields = 0, on(KEYS[3], 'HGETALL')
  for i = 1, #fields, 2 do
    local name, admitted = fields[i], tonumber(fields[i + 1]) or 0
    local r = redis.pcall('HMGET', 'smallcat:run:' .. name, 'fed', 'ended', 'total', 'cancelled')
    local is_gone = r.err or not r[1]
    local ended = not is_gone and count(r[2]) or 0
    if name ~= run and (is_gone or r[4] or r[3] and ended >= count(r[3])) then
      redis.call('HDEL', KEYS[3], name)
    else
      open = open + math.max(0, admitted - ended)
    end
  end
  return open
end
local function look_at_those_due(key)
  local looked, new = 0, 0
  while looked < AT_ONCE do
    local due = redis.call('ZRANGEBYSCORE', key, '-inf', time, 'WITHSCORES', 'LIMIT', new, 500)
    for i = 1, #due, 2 do
      local r = redis.pcall('HMGET', 'smallcat:job:' .. due[i], 'state', 'waits_for')
      local state, waits_for = r[1], r[2]
      if state == 'queued' or state == 'running' then
        local open = waits_for and waiting_key or KEYS[2]
        if open ~= key then redis.call('ZREM', key, due[i]) end
        redis.call('ZADD', open, time + AGAIN_S, due[i])
      elseif not state and time - due[i + 1] < NEW_S then new = new + 1
      else redis.call('ZREM', key, due[i]) end
    end
    looked = looked + #due / 2
    if #due < 1000 then return end
  end
end

-- Whether a job is to wait for others.
local function is_to_wait(number)
  for parent in string.gmatch(ARGV[HEAD + 3 * number], '%x+') do
    local state = redis.pcall('HGET', 'smallcat:job:' .. parent, 'state')
    if state == 'queued' or state == 'running' then return true end
  end
  return false
end

local admitted, stopped, open = asked, '', 0
local waits = {}
if most_open ~= '' then
  most_open = tonumber(most_open)
  -- Those that wait no longer are open.
  on(waiting_key, 'ZCARD')
  look_at_those_due(waiting_key)
  local in_runs, new, seen = open_in_runs(), asked - noted, {}
  open = on(KEYS[2], 'ZCARD') + in_runs
  if run == '' then
    -- Equal jobs are one.
    new = 0
    local waiting = redis.call('ZCARD', waiting_key)
    for i = 1, asked do
      local id = ARGV[HEAD - 2 + 3 * i]
      waits[i] = is_to_wait(i)
      if not seen[id] and not redis.call('ZSCORE', waits[i] and waiting_key or KEYS[2], id) then
        if waits[i] then waiting = waiting + 1 else new = new + 1 end
      end
      seen[id] = true
    end
    if waiting > most_open then
      admitted, stopped = 0, 'queued'
      open = waiting
    end
  end
  if stopped == '' and open + new > most_open then
    look_at_those_due(KEYS[2])
    open = redis.call('ZCARD', KEYS[2]) + in_runs
  end
  if stopped == '' and open + new > most_open then
    admitted = (run ~= '' and noted or 0) + math.max(0, math.min(new, most_open - open))
    stopped = 'queued'
  end
end
local spent, work = 0, 0
if most_work ~= '' then
  most_work = tonumber(most_work)
  spent = math.max(0, tonumber(on(KEYS[1], 'HGET', today) or 0) or 0)
  for i = 1 + noted, admitted do
    local cost = tonumber(ARGV[HEAD - 1 + 3 * i])
    if spent + work + cost > most_work then
      admitted, stopped = i - 1, 'day'
      break
    end
    work = work + cost
  end
end
local left_s = 86400 - time % 86400
local result = {admitted, open, string.format('%.0f', spent), string.format('%.0f', left_s), stopped}
if is_whole == '1' and admitted < asked then
  result[1] = 0
  return result
end
if work > 0 then
  if spent == 0 then redis.call('DEL', KEYS[1]) end
  redis.call('HINCRBY', KEYS[1], today, string.format('%.0f', work))
  redis.call('EXPIRE', KEYS[1], 172800)
end
if run ~= '' then
  if admitted > noted then
    redis.call('HSET', KEYS[3], run, string.format('%.0f', first + admitted))
    redis.call('EXPIRE', KEYS[3], ttl)
  end
elseif most_open ~= '' then
  for i = 1, asked do redis.call('ZADD', waits[i] and waiting_key or KEYS[2], time, ARGV[HEAD - 2 + 3 * i]) end
  redis.call('EXPIRE', KEYS[2], ttl)
  redis.call('EXPIRE', waiting_key, ttl)
end
if run == '' and KEYS[4] then redis.call('SET', KEYS[4], admitted, 'EX', note_ttl) end
return result
