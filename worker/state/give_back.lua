-- Undoes a claim: the job is queued again.
--
-- KEYS     the record, the job's attempts
-- ARGV     message id, holder (`claim.lua`), how the attempt failed as JSON (`worker.contract.record.Attempt`);
--          '' where it was not the job's fault and does not count, 'death' where it ended as one by the death of
--          its worker does, or ''
-- Returns  1 when it was undone, 0 when the message does not hold the claim
-- include go_on.lua
-- include heal.lua
go_on()
local message, me, failure, ended = unpack(ARGV)
local state, named, attempt = unpack(on(KEYS[1], 'HMGET', 'state', 'claim', 'attempts'))
local holds = on(KEYS[2], 'HGET', 'claim') == me and (named == message or state == 'running')
local is_open = on(KEYS[2], 'HDEL', 'open:' .. me) == 1
if is_open then
  if ended ~= 'death' then redis.call('HINCRBY', KEYS[2], 'deaths', -1) end
  if failure == '' or not holds then redis.call('HINCRBY', KEYS[2], 'attempts', -1) end
end
if not holds then return 0 end
if is_open then
  if failure == '' then
    redis.call('HDEL', KEYS[1], 'try:' .. (attempt or ''))
    redis.call('HSET', KEYS[1], 'attempts', redis.call('HGET', KEYS[2], 'attempts'))
  else
    redis.call('HSET', KEYS[1], 'try:' .. (attempt or 0), failure)
  end
  redis.call('HSET', KEYS[1], 'deaths', redis.call('HGET', KEYS[2], 'deaths'))
end
redis.call('HDEL', KEYS[2], 'claim', 'claim_until')
redis.call('HDEL', KEYS[1], 'claim', 'claim_until', 'delivery')
redis.call('HSET', KEYS[1], 'state', 'queued', 'step', 0)
redis.call('PUBLISH', KEYS[1], 'queued')
return 1
