-- Cancels a job that is queued; asks the worker of one that is running to stop it.
--
-- KEYS     the record
-- ARGV     job id, the workers' channel
-- Returns  the state after that; nothing where there is no record
-- include go_on.lua
local id, channel = unpack(ARGV)
local state = redis.call('HGET', KEYS[1], 'state')
if state == 'queued' then
  redis.call('HSET', KEYS[1], 'state', 'cancelled', 'error_type', 'JobCancelledError',
             'error', 'The job was cancelled.')
  redis.call('PUBLISH', KEYS[1], 'cancelled')
  return 'cancelled'
elseif state == 'running' then
  redis.call('HSET', KEYS[1], 'cancel', 1)
  redis.call('PUBLISH', channel, 'cancel ' .. id)
end
return state
