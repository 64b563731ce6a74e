-- Reads what a list of failed jobs shows, without the jobs themselves.
--
-- KEYS     the jobs' records
-- Returns  for each of them JSON: [state, error_type, error, runs, submitted_at, its last attempt as JSON];
--          false in the place of what is missing, in all places where there is no record that can be read
local found = {}
for i, key in ipairs(KEYS) do
  local r = redis.pcall('HMGET', key, 'state', 'error_type', 'error', 'runs', 'submitted_at', 'attempts')
  if r.err then r = {false, false, false, false, false, false} end
  r[6] = r[6] and redis.call('HGET', key, 'try:' .. r[6])
  found[i] = cjson.encode(r)
end
return found
