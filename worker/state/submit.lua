-- Writes the record of a job that is submitted, and the submission, and puts its message into its list. A job
-- that is queued or running stays as it is, unless it was cancelled; any other starts anew, and still belongs
-- to its runs. One that waits for other jobs keeps its message in its record (`chains.lua`).
--
-- KEYS     the record, the queues, the failed jobs, the submission, the latest jobs, the list; without a list
--          no message is put
-- ARGV     job as JSON, queue, seconds until the record expires, job id, submission or '', what is its own
--          as JSON, the id of its message, its fingerprint, 1 where the sender has named the queue lately,
--          the message, its webhook as JSON (`worker.contract.webhook`) or '', ids of the jobs whose pictures
--          it begins with, separated by blanks
-- Returns  'waiting' where it waits for others; why it was refused, and the id of the job that is in the way:
--          'failed', 'cancelled', or that too many jobs wait for it, 'many', or for each other, 'deep'
--
-- Its first write may take memory: a full Redis refuses the script before it has done anything.
-- Sent twice, because its answer was lost, it counts the submission once, and puts the message once.
-- include heal.lua
-- include ../contract/clock.lua
-- include ../contract/put.lua
local job, queue, ttl, id, submission, own, message, print, is_known, raw, hook, parents = unpack(ARGV)
local field = 'sub:' .. submission
local is_new_queue = is_known ~= '1' and on(KEYS[2], 'SADD', queue) == 1
local time = now()
-- Workers refresh what all jobs share; here it is done for one job of 16, which keeps a busy queue's cost down.
local refreshes = is_new_queue or tonumber(string.sub(time, -2)) % 16 == 0
local state, cancel, runs, mine, known, waits_for =
  unpack(on(KEYS[1], 'HMGET', 'state', 'cancel', 'runs', field, 'message', 'waits_for'))
-- What follows may begin with a write that takes no memory.
if state and is_known == '1' then on(KEYS[2], 'SADD', queue) end
local is_alive = (state == 'queued' or state == 'running') and not cancel
local is_done = state == 'done' and mine and submission ~= ''
local waits, holds = {}, false
if is_alive and waits_for or not (is_alive or is_done) and (parents or '') ~= '' then
  -- include chains.lua
  -- What its job says counts, not what its record does: producers can write that.
  local refused
  waits, refused = to_wait_for(id, parents or '')
  if refused and not is_alive then return refused end
  -- What cannot be waited for any more ends it soon.
  holds = KEYS[6] and (refused or #waits > 0)
  waits = waits or {}
  if holds then wait_for(id, waits, ttl) end
end
-- First of all: where the list cannot take the message, there is no record either.
if KEYS[6] and not holds and not (is_done or is_alive and mine and known == message) then put('LPUSH', KEYS[6], raw) end
-- Webhooks of submissions that nobody has told yet what became of them, as fields of a hash.
local untold, children = {}, false
if state and not (is_alive or is_done) then
  -- include outcome.lua
  -- include notify.lua
  if state == 'done' then note_all(KEYS[1], '=') end
  if state == 'failed' then note_all(KEYS[1], '~') end
  if state == 'cancelled' or cancel then note_all(KEYS[1], '-') end
  if redis.call('HEXISTS', KEYS[1], 'hooks') == 1 then
    -- Where an earlier worker has ended the job, they are told when it ends again.
    if state == 'cancelled' or cancel then notify_submissions(TOLD_BY_PRODUCERS, KEYS[1], 'cancelled') end
    for _, name in ipairs(redis.call('HKEYS', KEYS[1])) do
      if string.find(name, '^hook:') then
        untold[#untold + 1] = name
        untold[#untold + 1] = redis.call('HGET', KEYS[1], name)
      end
    end
  end
  children = redis.call('HEXISTS', KEYS[1], 'children') == 1
  redis.call('DEL', KEYS[1])
  on(KEYS[3], 'ZREM', id)
end
if is_alive then
  -- With a second message, none is the job's only one.
  if known ~= message then redis.call('HSET', KEYS[1], 'message', '') end
  if not mine then
    -- Whoever submitted a job by an earlier version is not counted: one such submission is assumed, unless only
    -- runs have sent the job.
    local subs, bulk = unpack(redis.call('HMGET', KEYS[1], 'subs', 'bulk'))
    local others = subs and count(subs) or bulk and 0 or 1
    redis.call('HSET', KEYS[1], field, print, 'subs', others + 1)
    if bulk then redis.call('HDEL', KEYS[1], 'bulk') end
  elseif mine ~= print then
    redis.call('HSET', KEYS[1], field, print)
  end
elseif not is_done then
  -- Where it is done, it was sent again because an answer was lost, or no replica confirmed it.
  redis.call('HSET', KEYS[1], 'state', 'queued', 'job', job, 'queue', queue, 'submitted_at', time, 'subs', 1,
             'message', message, field, print, unpack(runs and {'runs', runs} or {}))
  if children then redis.call('HSET', KEYS[1], 'children', 1) end
end
if #waits > 0 and holds then redis.call('HSET', KEYS[1], 'waits_for', table.concat(waits, ' '), 'ttl', ttl) end
if holds then redis.call('HSET', KEYS[1], 'held:' .. submission, KEYS[6] .. '\n' .. raw) end
if hook and hook ~= '' and not is_done then
  untold[#untold + 1] = 'hook:' .. submission
  untold[#untold + 1] = hook
end
if #untold > 0 then redis.call('HSET', KEYS[1], 'hooks', 1, unpack(untold)) end
redis.call('EXPIRE', KEYS[1], ttl)
if refreshes then redis.call('EXPIRE', KEYS[2], ttl) end
if submission ~= '' then redis.call('SET', KEYS[4], '+' .. own, 'EX', ttl) end
local function note_latest(key, member)
  on(key, 'ZADD', time, member)
  if refreshes then redis.call('ZREMRANGEBYRANK', key, 0, -1001) end
  -- No worker refreshes a tenant's own list.
  if refreshes or key ~= 'smallcat:latest' then redis.call('EXPIRE', key, ttl) end
end
note_latest(KEYS[5], id)
if KEYS[5] ~= 'smallcat:latest' then
  -- A tenant's jobs are in its own list, and in that of all.
  local all, tenant = string.match(KEYS[5], '^(smallcat:latest):(.+)$')
  if all then note_latest(all, tenant .. '/' .. id) end
end
return holds and 'waiting'
