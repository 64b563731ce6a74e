-- Calls a command on a key. A key of another type, which no version of ours writes, is deleted first: it
-- must not stand in the way of its job, or of others.
local function on(key, command, ...)
  local result = redis.pcall(command, key, ...)
  if type(result) ~= 'table' or not result.err then return result end
  if string.find(result.err, 'WRONGTYPE', 1, true) then redis.call('DEL', key) end
  return redis.call(command, key, ...)
end
-- A number of a hash, which may be missing, or no number.
local function count(text) return text and tonumber(string.match(text, '^%d+$') or 0) or 0 end
