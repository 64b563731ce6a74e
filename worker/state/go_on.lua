-- A write that does nothing, before all others of a script. A full Redis refuses a script's first write if that
-- may take memory, and none after it. Workers go on, which is what makes room; and so does who cancels.
local function go_on() redis.pcall('HDEL', KEYS[1], '') end
-- The same for scripts that run for each job: only where the first write, an HSET, is refused.
local function set_first(...)
  local found = redis.pcall('HSET', ...)
  if type(found) == 'table' and found.err then
    go_on()
    redis.call('HSET', ...)
  end
end
