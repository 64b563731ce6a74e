-- Fails a job whose message is set aside, so that nobody waits for it: the record of the submission that sent
-- the message, once all its other submissions' messages are set aside, too, and the run that sent it.
--
-- KEYS     the record, the failed jobs, the job's attempts
-- ARGV     message id, holder (`claim.lua`), fingerprint (`worker.contract.found_message`), job id, seconds that
--          the record stays, class of the error, its text, the message's run mark or '', its job as JSON and
--          its queue, '' where they cannot be read
-- Returns  1 when a job or a run was told
--
-- Whoever pushes into queues can send a message under another one's id: so the fingerprint must be one that the
-- submission, or the run, has noted. What an earlier version has noted no fingerprint of fails until a message
-- of it comes that can be read (`claim.lua`).
-- include go_on.lua
-- include heal.lua
-- include mark_runs.lua
-- include notify.lua
-- include wanted_by_runs.lua
-- include chains.lua
-- include ../contract/clock.lua
go_on()
local message, me, print, id, ttl, kind, text, mark, job, queue = unpack(ARGV)
local state, known, runs, bulk, waits_for =
  unpack(on(KEYS[1], 'HMGET', 'state', 'message', 'runs', 'bulk', 'waits_for'))
local holder, until_s = unpack(on(KEYS[3], 'HMGET', 'claim', 'claim_until'))
-- Whether the run has sent this very message.
local function is_of_run()
  local run, number = string.match(mark, '^(%w+):(%d+):')
  local prints = 'smallcat:run:' .. (run or '') .. ':prints'
  if not run then return false end
  if redis.call('EXISTS', prints) == 0 then return redis.call('EXISTS', 'smallcat:run:' .. run) == 1 end
  local again, block = unpack(redis.call('HMGET', prints, '=' .. number, math.floor(number / 512)))
  local first = number % 512 * 8 + 1
  for _, noted in ipairs({again or '', string.sub(block or '', first, first + 7)}) do
    local digits = string.gsub(noted, '.', function(byte) return string.format('%02x', string.byte(byte)) end)
    if digits == string.sub(print, 1, 16) then return true end
  end
  return false
end
local read, of_run = pcall(is_of_run)
of_run = read and of_run
if of_run then
  mark_runs(mark, {'failed', false, false, kind, text, false, false})
  if not state and job ~= '' then
    redis.call('HSET', KEYS[1], 'job', job, 'queue', queue, 'submitted_at', now(), 'bulk', 1, 'runs', mark)
    state, bulk = 'queued', '1'
  end
end
if state ~= 'queued' and state ~= 'running' then return of_run and 1 or 0 end
-- Which submission has sent it, and how many messages are left.
local own, left, unnoted, noted = of_run and bulk, 0, false, false
local fields = redis.call('HGETALL', KEYS[1])
for i = 1, #fields, 2 do
  if string.sub(fields[i], 1, 4) == 'sub:' then
    noted = true
    if fields[i + 1] == print then
      own = true
      redis.call('HSET', KEYS[1], fields[i], '-')
    elseif fields[i + 1] ~= '-' then
      left = left + 1
      if fields[i + 1] == '1' then unnoted = fields[i] end
    end
  end
end
if not own and (not known or known == '' or known == message) then
  if unnoted then
    left = left - 1
    redis.call('HSET', KEYS[1], unnoted, '-')
  end
  own = unnoted or not (noted or bulk)
end
local is_claimed = holder and holder ~= me and (tonumber(until_s or 0) or 0) > tonumber(now())
if not own or left > 0 or is_claimed or wanted_by_runs(runs or '') then return of_run and 1 or 0 end
redis.call('HSET', KEYS[1], 'state', 'failed', 'error_type', kind, 'error', text)
redis.call('HDEL', KEYS[1], 'claim', 'claim_until', 'delivery', 'cancel')
if waits_for then end_waiting(id, false) end
redis.call('EXPIRE', KEYS[1], ttl)
on(KEYS[2], 'ZADD', redis.call('TIME')[1], id)
redis.call('EXPIRE', KEYS[2], ttl)
redis.call('PUBLISH', KEYS[1], 'failed')
if redis.call('HEXISTS', KEYS[1], 'hooks') == 1 then notify_submissions(TOLD_BY_WORKERS, KEYS[1], 'failed') end
settle(id, 'failed', TOLD_BY_WORKERS)
return 1
