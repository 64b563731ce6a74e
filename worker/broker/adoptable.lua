-- Lists messages of ours that a worker of an earlier version held, under kombu's names, and whose lease ran
-- out. Other applications keep theirs under the same names: those are left alone.
--
-- KEYS     kombu's index of held messages, its hash
-- ARGV     the lease in seconds, how many to look at, how many to skip first
-- Returns  how many were looked at, then {tag, score, entry} for each of ours
--
-- An entry ends in its exchange, which is empty for a task, and its queue.
-- include ../contract/clock.lua
local ceiling = string.format('%.6f', now() - ARGV[1])
local due = redis.call('ZRANGEBYSCORE', KEYS[1], '-inf', ceiling, 'WITHSCORES', 'LIMIT', ARGV[3], ARGV[2])
local found = {#due / 2}
for i = 1, #due, 2 do
  local entry = redis.call('HGET', KEYS[2], due[i])
  if entry and string.find(entry, ',%s*"",%s*"smallcat%.[^"\\]*"%]$') then
    found[#found + 1] = {due[i], due[i + 1], entry}
  end
end
return found
