-- Acknowledges messages for which nothing is left to do, by what their jobs' records say here and now: the job
-- has ended, or another message of it is worked on.
--
-- KEYS     the index of held messages, their hash, then for each message its job's record and the job's attempts
-- ARGV     for each message the tag under which it is held, its id, and who it is as the job's holder
-- Returns  the tags of those that were not acknowledged
--
-- A record that does not say so was written on a primary that a replica has replaced since, before it was
-- replicated. Acknowledged on the new primary, the job would be lost.
local function is_over(record, attempts, message, me)
  local r = redis.pcall('HMGET', record, 'state', 'claim')
  if r.err then return false end
  local state, named = r[1], r[2]
  if state == 'done' or state == 'failed' or state == 'cancelled' then return true end
  local holder = redis.pcall('HGET', attempts, 'claim')
  -- The holder is one of the copies that a message may have.
  return named and named ~= '' and (named ~= message or type(holder) == 'string' and holder ~= me)
end
local over, kept = {}, {}
for i = 1, #ARGV / 3 do
  local tag, message, me = unpack(ARGV, 3 * i - 2, 3 * i)
  if is_over(KEYS[2 * i + 1], KEYS[2 * i + 2], message, me) then
    over[#over + 1] = tag
  else
    kept[#kept + 1] = tag
  end
end
if #over > 0 then
  redis.call('ZREM', KEYS[1], unpack(over))
  redis.call('HDEL', KEYS[2], unpack(over))
end
return kept
