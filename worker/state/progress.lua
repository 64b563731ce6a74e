-- Writes the progress of running jobs and extends their claims.
--
-- KEYS     for each job its record and its attempts
-- ARGV     seconds that the claims last, then for each job steps done and steps in all
-- Returns  the numbers, from 1, of the jobs that were cancelled
--
-- A record that cannot be read is left alone: it is no reason to let the others' claims run out.
-- include go_on.lua
-- include ../contract/clock.lua
go_on()
local until_s = tonumber(now()) + ARGV[1]
local cancelled = {}
for i = 1, #KEYS / 2 do
  local key, attempts = KEYS[2 * i - 1], KEYS[2 * i]
  local r = redis.pcall('HMGET', key, 'state', 'cancel')
  if r[1] == 'running' then
    redis.call('HSET', key, 'step', ARGV[2 * i], 'steps', ARGV[2 * i + 1], 'claim_until', until_s)
  end
  if redis.call('HEXISTS', attempts, 'claim') == 1 then
    redis.call('HSET', attempts, 'claim_until', until_s)
  end
  if r[1] == 'cancelled' or r[1] == 'running' and r[2] then cancelled[#cancelled + 1] = i end
end
return cancelled
