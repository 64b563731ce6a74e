-- Acknowledges messages for which nothing is left to do, by what their jobs' records say here and now: the job
-- has ended, or another message of it is worked on.
--
-- KEYS     the index of held messages, their hash, then for each message its job's record and the job's attempts
-- ARGV     for each message the tag under which it is held, and the message as its claim names it
-- Returns  the tags of those that were not acknowledged
--
-- A record that does not say so was written on a primary that a replica has replaced since, before it was
-- replicated. Acknowledged on the new primary, the job would be lost.
local function is_over(record, attempts, message)
  local r, a = redis.pcall('HMGET', record, 'state', 'claim'), redis.pcall('HGET', attempts, 'claim')
  if r.err then return false end
  local state, named = r[1], r[2]
  if state == 'done' or state == 'failed' or state == 'cancelled' then return true end
  -- Two copies of a message have one id, and are held under two tags. Earlier workers name the id alone.
  local id = string.match(message, '^[^/]*')
  return named and (named ~= id or type(a) == 'string' and string.match(a, '^[^/]*') == id and a ~= message)
end
local kept = {}
for i = 1, #ARGV, 2 do
  if is_over(KEYS[i + 2], KEYS[i + 3], ARGV[i + 1]) then
    redis.call('ZREM', KEYS[1], ARGV[i])
    redis.call('HDEL', KEYS[2], ARGV[i])
  else
    kept[#kept + 1] = ARGV[i]
  end
end
return kept
