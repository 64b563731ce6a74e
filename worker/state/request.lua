-- Takes a request from a tenant's token bucket: so many a second in the long run, so many at once.
--
-- KEYS     the bucket
-- ARGV     requests a second, requests at once
-- Returns  '0' where there was one; else seconds until there is one, as text
-- include go_on.lua
-- include heal.lua
-- include ../contract/clock.lua
go_on()
local rate, burst = tonumber(ARGV[1]), tonumber(ARGV[2])
local time = tonumber(now())
local tokens, at = unpack(on(KEYS[1], 'HMGET', 'tokens', 'at'))
tokens = math.min(burst, (tonumber(tokens) or burst) + math.max(0, time - (tonumber(at) or time)) * rate)
local wait_s = 0
if tokens < 1 then wait_s = (1 - tokens) / rate else tokens = tokens - 1 end
redis.call('HSET', KEYS[1], 'tokens', string.format('%.6f', tokens), 'at', string.format('%.6f', time))
redis.call('EXPIRE', KEYS[1], math.ceil(burst / rate) + 1)
return string.format('%.6f', wait_s)
