-- Announces a worker, and brings the digest up to date.
--
-- KEYS     the worker, the set of names, the digest, the workers' book, then keys that all share, which live as
--          long as the names
-- ARGV     name, the announcement as JSON, seconds that it lives, seconds that the names and the book live,
--          group, what it serves and reads as members of a JSON object, when it started
-- Returns  the version of the digest whose models are to be noted as last seen; '' while they are
-- A full Redis refuses a script's first write if that may take memory, and none after it: so it deletes first.
-- include fleet_book.lua
local name, announcement, ttl, keep_s, group, served, started_at = unpack(ARGV)
redis.call('DEL', KEYS[1])
redis.call('SET', KEYS[1], announcement, 'EX', ttl)
redis.call('SADD', KEYS[2], name)
local is_changed = enter(KEYS[4], name, string.format('%.6f', time + ttl), group, served, started_at)
is_changed = sweep(KEYS[4], KEYS[2]) or is_changed
local version = publish(KEYS[4], KEYS[3], KEYS[2], ttl, is_changed)
-- Once a minute: each worker announces itself every few seconds.
if is_changed or version ~= '' or time % 60 < ttl / 2 then
  keep(KEYS[4], group, keep_s)
  for _, key in ipairs({KEYS[2], unpack(KEYS, 5)}) do redis.call('EXPIRE', key, keep_s) end
end
return version
