-- Writes a job's final state, once; with the done mark, acknowledges the message of who made the picture.
--
-- KEYS     the record, the failed jobs, the job's attempts, the jobs of its tenant that were done last, the
--          index of held messages, their hash
-- ARGV     state, seconds until the record expires, message id, holder (`claim.lua`), job id, the tag of the
--          held message that is acknowledged or '', Redis' time as the worker has it or '', 1 where the worker
--          has written into the list of what was done last lately; then field and value in turn; last, of a
--          tenant's job that is done, 'usage' and what it has used (`usage.lua`)
-- Returns  1 when it was written, 0 when it was not, -1 when the job was to be cancelled and somebody wants it
--
-- A picture is done whoever made it, unless the job was cancelled: that was said already. A failure counts only
-- from the message that holds the claim, so that a job that was cancelled and submitted again is not cancelled
-- twice.
-- A replica that becomes the primary has the mark and the acknowledgement, or neither.
-- include heal.lua
-- include ../contract/clock.lua
-- Seconds that the record stays of a job that only a run has sent: the lasting record is in the bucket, and a
-- run of a million jobs must not leave a million records here.
local BULK_TTL_S = 60
-- Seconds that the record stays of any other job that is done.
local DONE_TTL_S = 3600
local final, ttl, message, me, id, tag, time, is_known = unpack(ARGV, 1, 8)
if tag ~= '' then
  redis.call('ZREM', KEYS[5], tag)
  redis.call('HDEL', KEYS[6], tag)
end
local state, cancel, runs, bulk, error_type, hooks, forgotten, children, waits_for =
  unpack(on(KEYS[1], 'HMGET', 'state', 'cancel', 'runs', 'bulk', 'error_type', 'hooks', 'forgotten', 'children',
            'waits_for'))
-- Whoever forgets the job waits until nobody works on it (`forget.lua`).
if forgotten then redis.call('DEL', KEYS[3]) end
if state == 'done' or state == final or state == 'cancelled' then return 0 end
if final ~= 'done' then
  -- A record that is queued without a claim was written by another submission. Producers can delete the claim.
  local is_named = state == 'running' or redis.call('HGET', KEYS[1], 'claim') == message
  if not is_named or on(KEYS[3], 'HGET', 'claim') ~= me then
    -- The job was submitted anew meanwhile: this attempt is none of the new one's.
    if redis.call('HDEL', KEYS[3], 'open:' .. me) == 1 then
      redis.call('HINCRBY', KEYS[3], 'attempts', -1)
      redis.call('HINCRBY', KEYS[3], 'deaths', -1)
    end
    return 0
  end
end
if final == 'cancelled' and not cancel then return -1 end
-- A full Redis refuses a script's first write if that may take memory, and none after it: so it deletes first.
redis.call('DEL', KEYS[3])
redis.call('HSET', KEYS[1], 'state', final, 'claim', '', 'deaths', '', unpack(ARGV, 9))
if cancel then redis.call('HDEL', KEYS[1], 'cancel') end
if waits_for then
  -- include chains.lua
  end_waiting(id, false)
end
if final == 'done' and error_type then redis.call('HDEL', KEYS[1], 'error', 'error_type') end
redis.call('EXPIRE', KEYS[1], final == 'done' and math.min(ttl, bulk and BULK_TTL_S or DONE_TTL_S) or ttl)
if final == 'failed' then
  on(KEYS[2], 'ZADD', redis.call('TIME')[1], id)
  redis.call('EXPIRE', KEYS[2], ttl)
  -- Producers can write the record; that it says so is believed while this is here (`claim.lua`).
  redis.call('HSET', KEYS[3], 'failed', 1)
  redis.call('EXPIRE', KEYS[3], ttl)
elseif state == 'failed' then
  on(KEYS[2], 'ZREM', id)
end
if ARGV[#ARGV - 1] == 'usage' then
  -- include usage.lua
  count_usage(ARGV[#ARGV])
end
if final == 'done' then
  -- The order of a page's pictures hangs on it, and no more.
  if time == '' then time = now() end
  on(KEYS[4], 'ZADD', time, id)
  -- For one job of 16, which keeps the cost of the others down.
  local refreshes = tonumber(string.sub(time, -2)) % 16 == 0
  if refreshes then redis.call('ZREMRANGEBYRANK', KEYS[4], 0, -201) end
  if refreshes or is_known ~= '1' then redis.call('EXPIRE', KEYS[4], ttl) end
end
redis.call('PUBLISH', KEYS[1], final)
if runs or hooks then
  -- include mark_runs.lua
  -- include notify.lua
  mark_runs(runs or '')
  if hooks then notify_submissions(TOLD_BY_WORKERS, KEYS[1], final) end
end
if children then
  -- include chains.lua
  settle(id, final, TOLD_BY_WORKERS)
end
return 1
