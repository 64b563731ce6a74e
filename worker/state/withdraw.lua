-- Withdraws the announcement of a worker, and brings the digest up to date.
--
-- KEYS     the worker, the set of names, the digest, the workers' book
-- ARGV     name, seconds that the digest lives
-- include fleet_book.lua
redis.call('DEL', KEYS[1])
redis.call('SREM', KEYS[2], ARGV[1])
local is_changed = leave(KEYS[4], ARGV[1])
is_changed = sweep(KEYS[4], KEYS[2]) or is_changed
if is_changed then publish(KEYS[4], KEYS[3], KEYS[2], ARGV[2], true) end
