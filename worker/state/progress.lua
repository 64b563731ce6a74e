-- Writes the progress of running jobs and extends their claims.
--
-- KEYS     the records
-- ARGV     seconds that the claims last, then for each job steps done and steps in all
-- Returns  the numbers, from 1, of the jobs that were cancelled
-- include go_on.lua
-- include ../contract/clock.lua
local until_s = tonumber(now()) + ARGV[1]
local cancelled = {}
for i, key in ipairs(KEYS) do
  if redis.call('HGET', key, 'state') == 'running' then
    redis.call('HSET', key, 'step', ARGV[2 * i], 'steps', ARGV[2 * i + 1], 'claim_until', until_s)
    if redis.call('HEXISTS', key, 'cancel') == 1 then cancelled[#cancelled + 1] = i end
  end
end
return cancelled
