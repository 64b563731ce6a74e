-- Reads what a list of failed jobs shows, without the jobs themselves.
--
-- KEYS     the jobs' records
-- Returns  for each of them JSON: [state, error_type, error, runs, submitted_at, its last attempt as JSON];
--          false in the place of what is missing, in all places where there is no record (any more)
local found = {}
for i, key in ipairs(KEYS) do
  local r = redis.call('HMGET', key, 'state', 'error_type', 'error', 'runs', 'submitted_at', 'attempts')
  r[6] = r[6] and redis.call('HGET', key, 'try:' .. r[6])
  found[i] = cjson.encode(r)
end
return found
