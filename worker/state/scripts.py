"""The Lua scripts behind `worker.state.records`: each is one step that is done or not done, by Redis' clock.

A Redis that is full refuses a script's first write, if that one may take memory, and none after it. So a
producer's script begins with such a write, and is refused. A worker's begins with one that takes none:
workers go on, which is what makes room.
"""

from __future__ import annotations

from typing import Final

# Seconds that the record of a job that nobody submitted by itself stays after its picture is in the bucket,
# where the lasting record is: a run of a million jobs must not leave a million hashes here.
_BULK_TTL_S: Final = 60

# The first write of a worker's script: it does nothing.
_GO_ON: Final = "redis.call('HDEL', KEYS[1], '')\n"

# Tells the runs that a final job belongs to, as `run_mark` writes them: its bit is set, and the news
# is appended for whoever feeds the run. A run that is gone, or never sent that job, is left alone.
_MARK: Final = """
local function mark(runs)
  local r = redis.call('HMGET', KEYS[1], 'state', 'uri', 'timings', 'error_type', 'error', 'cached',
                       'attempts')
  for run, index, file, line in string.gmatch(runs, '(%w+):(%d+):(%d+):(%d+):') do
    local key = 'smallcat:run:' .. run
    local ttl, fed = unpack(redis.call('HMGET', key, 'ttl', 'fed'))
    if ttl and fed and tonumber(index) < tonumber(fed) then
      local was = redis.call('GETBIT', key .. ':done', index) + redis.call('GETBIT', key .. ':failed', index)
      if r[1] == 'done' then
        redis.call('SETBIT', key .. ':done', index, 1)
        redis.call('SETBIT', key .. ':failed', index, 0)
      elseif redis.call('GETBIT', key .. ':done', index) == 0 then
        redis.call('SETBIT', key .. ':failed', index, 1)
      end
      if was == 0 then redis.call('HINCRBY', key, 'ended', 1) end
      redis.call('RPUSH', key .. ':news', cjson.encode({tonumber(index), tonumber(file), tonumber(line),
                 string.sub(KEYS[1], 14), r[1], r[2], r[3], r[4], r[5], r[6], r[7]}))
      for _, part in ipairs({'', ':done', ':failed', ':news'}) do redis.call('EXPIRE', key .. part, ttl) end
    end
  end
end
"""

# KEYS[1] the record, KEYS[2] the queues, KEYS[3] the failed jobs. ARGV: job, queue, ttl, id.
# A job that is in flight stays as it is; any other starts anew, and belongs to the runs that it did.
SUBMIT: Final = """
redis.call('SADD', KEYS[2], ARGV[2])
redis.call('EXPIRE', KEYS[2], ARGV[3])
local state = redis.call('HGET', KEYS[1], 'state')
if state ~= 'queued' and state ~= 'running' or redis.call('HEXISTS', KEYS[1], 'cancel') == 1 then
  local runs = redis.call('HGET', KEYS[1], 'runs')
  redis.call('DEL', KEYS[1])
  if runs then redis.call('HSET', KEYS[1], 'runs', runs) end
  local now = redis.call('TIME')
  redis.call('HSET', KEYS[1], 'state', 'queued', 'job', ARGV[1], 'queue', ARGV[2],
             'submitted_at', now[1] .. '.' .. string.format('%06d', now[2]))
end
redis.call('HDEL', KEYS[1], 'bulk')
redis.call('EXPIRE', KEYS[1], ARGV[3])
redis.call('ZREM', KEYS[3], ARGV[4])
"""

# KEYS[1] the record. ARGV: message, worker, lease, max attempts, ttl, job, queue, delivery, and the
# run that the message belongs to, or ''.
# The claim belongs to a message, not to a worker: the same message delivered again takes it over at once.
# The same delivery asking again (its answer was lost with a connection) is one attempt.
# An attempt counts as a death until it is heard how it ended.
CLAIM: Final = (
    _GO_ON
    + _MARK
    + """
local t = redis.call('TIME')
local now = tonumber(t[1] .. '.' .. string.format('%06d', t[2]))
local function get(field) return redis.call('HGET', KEYS[1], field) end
local state = get('state')
if state == 'done' or state == 'failed' or state == 'cancelled' then
  mark(ARGV[9])
  return {'final', 0, 0}
end
if ARGV[9] ~= '' then
  local runs = get('runs') or ''
  if not string.find(' ' .. runs .. ' ', ' ' .. ARGV[9] .. ' ', 1, true) then
    redis.call('HSET', KEYS[1], 'runs', runs == '' and ARGV[9] or runs .. ' ' .. ARGV[9])
  end
end
if get('cancel') then
  redis.call('HSET', KEYS[1], 'state', 'cancelled', 'error_type', 'JobCancelledError',
             'error', 'The job was cancelled.')
  redis.call('HDEL', KEYS[1], 'claim', 'claim_until', 'delivery', 'deaths', 'cancel')
  redis.call('PUBLISH', KEYS[1], 'cancelled')
  mark(get('runs') or '')
  return {'final', 0, 0}
end
local holder = get('claim')
if holder and holder ~= ARGV[1] and tonumber(get('claim_until')) > now then return {'taken', 0, 0} end
local attempts = tonumber(get('attempts') or 0)
local verdict = 'render'
if not state then
  redis.call('HSET', KEYS[1], 'job', ARGV[6], 'queue', ARGV[7],
             'submitted_at', string.match(ARGV[9], ':(%d+)$') or now)
  if ARGV[9] ~= '' then redis.call('HSET', KEYS[1], 'bulk', 1) end
end
redis.call('HSET', KEYS[1], 'claim', ARGV[1], 'claim_until', now + ARGV[3])
redis.call('EXPIRE', KEYS[1], ARGV[5])
if get('delivery') ~= ARGV[8] then
  if attempts >= tonumber(ARGV[4]) then
    verdict = 'poison'
    redis.call('HDEL', KEYS[1], 'delivery')
  else
    attempts = redis.call('HINCRBY', KEYS[1], 'attempts', 1)
    redis.call('HINCRBY', KEYS[1], 'deaths', 1)
    redis.call('HSET', KEYS[1], 'delivery', ARGV[8], 'state', 'running', 'worker', ARGV[2], 'step', 0,
               'try:' .. attempts, cjson.encode({attempt = attempts, worker = ARGV[2], at = now}))
    redis.call('PUBLISH', KEYS[1], 'running')
  end
end
return {verdict, attempts, tostring(now - tonumber(get('submitted_at')))}
"""
)

# KEYS[1] the record, KEYS[2] the failed jobs. ARGV: state, ttl, message, id, then field and value in turn.
# A final state is written once.
# A picture is done whoever made it; a failure counts only from the message that holds the claim, so that a
# job that was cancelled and submitted again is not cancelled twice.
FINISH: Final = (
    _GO_ON
    + _MARK
    + """
local state = redis.call('HGET', KEYS[1], 'state')
if state == 'done' or state == ARGV[1] then return 0 end
if ARGV[1] ~= 'done' and redis.call('HGET', KEYS[1], 'claim') ~= ARGV[3] then return 0 end
for i = 5, #ARGV, 2 do redis.call('HSET', KEYS[1], ARGV[i], ARGV[i + 1]) end
redis.call('HSET', KEYS[1], 'state', ARGV[1])
redis.call('HDEL', KEYS[1], 'claim', 'claim_until', 'delivery', 'deaths', 'cancel')
if ARGV[1] == 'done' then redis.call('HDEL', KEYS[1], 'error', 'error_type') end
redis.call('EXPIRE', KEYS[1], ARGV[2])
if ARGV[1] == 'failed' then
  redis.call('ZADD', KEYS[2], redis.call('TIME')[1], ARGV[4])
  redis.call('EXPIRE', KEYS[2], ARGV[2])
else
  redis.call('ZREM', KEYS[2], ARGV[4])
end
redis.call('PUBLISH', KEYS[1], ARGV[1])
mark(redis.call('HGET', KEYS[1], 'runs') or '')
if ARGV[1] == 'done' and redis.call('HEXISTS', KEYS[1], 'bulk') == 1 then
  redis.call('EXPIRE', KEYS[1], math.min(ARGV[2], """
    + f"{_BULK_TTL_S}))"
    + """
end
return 1
"""
)

# KEYS[1] the record. ARGV: message, then what the attempt ended with as JSON, '' where it was not the job's
# fault and does not count. Back to the queue.
GIVE_BACK: Final = (
    _GO_ON
    + """
if redis.call('HGET', KEYS[1], 'claim') ~= ARGV[1] then return 0 end
if redis.call('HDEL', KEYS[1], 'delivery') == 1 then
  local attempt = redis.call('HGET', KEYS[1], 'attempts')
  if ARGV[2] == '' then
    redis.call('HINCRBY', KEYS[1], 'attempts', -1)
    redis.call('HDEL', KEYS[1], 'try:' .. attempt)
  else
    redis.call('HSET', KEYS[1], 'try:' .. attempt, ARGV[2])
  end
  redis.call('HINCRBY', KEYS[1], 'deaths', -1)
end
redis.call('HDEL', KEYS[1], 'claim', 'claim_until')
redis.call('HSET', KEYS[1], 'state', 'queued', 'step', 0)
redis.call('PUBLISH', KEYS[1], 'queued')
return 1
"""
)

# KEYS[1] the record, ARGV[1] the id, ARGV[2] the channel. Returns the state after it.
CANCEL: Final = (
    _GO_ON
    + """
local state = redis.call('HGET', KEYS[1], 'state')
if state == 'queued' then
  redis.call('HSET', KEYS[1], 'state', 'cancelled', 'error_type', 'JobCancelledError',
             'error', 'The job was cancelled.')
  redis.call('PUBLISH', KEYS[1], 'cancelled')
  return 'cancelled'
elseif state == 'running' then
  redis.call('HSET', KEYS[1], 'cancel', 1)
  redis.call('PUBLISH', ARGV[2], 'cancel ' .. ARGV[1])
end
return state
"""
)

# KEYS: the records. ARGV: lease, then step and steps for each. Returns for each whether it was cancelled.
PROGRESS: Final = (
    _GO_ON
    + """
local t = redis.call('TIME')
local now = tonumber(t[1] .. '.' .. string.format('%06d', t[2]))
local cancelled = {}
for i, key in ipairs(KEYS) do
  if redis.call('HGET', key, 'state') == 'running' then
    redis.call('HSET', key, 'step', ARGV[2 * i], 'steps', ARGV[2 * i + 1], 'claim_until', now + ARGV[1])
    if redis.call('HEXISTS', key, 'cancel') == 1 then cancelled[#cancelled + 1] = i end
  end
end
return cancelled
"""
)
