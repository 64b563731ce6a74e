-- What TIME answers, as text: Unix seconds with six decimals.
local function text_of(time) return time[1] .. '.' .. string.sub('00000' .. time[2], -6) end
-- Redis' own clock, likewise.
local function now() return text_of(redis.call('TIME')) end
