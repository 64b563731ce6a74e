-- Counts what a tenant's job has used, in the book of the day (UTC).
--
-- used     tenant, 1 for a picture that was made, 1 for one that was in the bucket already, microseconds of the
--          device's time, bytes of the picture; separated by blanks
local USAGE_TTL_S = 34560000
local function count_usage(used)
  local tenant, images, cached, device_us, bytes = string.match(used, '^(%S+) (%d+) (%d+) (%d+) (%d+)$')
  if not tenant then return end
  local key = 'smallcat:worker-only:usage:' .. math.floor(redis.call('TIME')[1] / 86400)
  local function add(name, number)
    if number ~= '0' then on(key, 'HINCRBY', tenant .. ':' .. name, number) end
  end
  add('images', images)
  add('cached', cached)
  add('device_us', device_us)
  add('bytes', bytes)
  -- Days begin with a key that does not expire.
  if redis.call('TTL', key) == -1 then redis.call('EXPIRE', key, USAGE_TTL_S) end
end
