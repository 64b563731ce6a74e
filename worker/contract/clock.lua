-- Redis' own clock: Unix seconds with six decimals, as text.
local function now()
  local time = redis.call('TIME')
  return time[1] .. '.' .. string.format('%06d', time[2])
end
