-- Undoes a claim: the job is queued again.
--
-- KEYS     the record
-- ARGV     message id, how the attempt failed as JSON (`worker.contract.record.Attempt`); '' where it was not
--          the job's fault and does not count
-- Returns  1 when it was undone, 0 when the message does not hold the claim
-- include go_on.lua
local message, failure = unpack(ARGV)
if redis.call('HGET', KEYS[1], 'claim') ~= message then return 0 end
if redis.call('HDEL', KEYS[1], 'delivery') == 1 then
  local attempt = redis.call('HGET', KEYS[1], 'attempts')
  if failure == '' then
    redis.call('HINCRBY', KEYS[1], 'attempts', -1)
    redis.call('HDEL', KEYS[1], 'try:' .. attempt)
  else
    redis.call('HSET', KEYS[1], 'try:' .. attempt, failure)
  end
  redis.call('HINCRBY', KEYS[1], 'deaths', -1)
end
redis.call('HDEL', KEYS[1], 'claim', 'claim_until')
redis.call('HSET', KEYS[1], 'state', 'queued', 'step', 0)
redis.call('PUBLISH', KEYS[1], 'queued')
return 1
