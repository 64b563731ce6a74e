-- Notes what became of a submission. Its key lives as long as before.
--
-- key         the job's record
-- submission  its id
-- outcome     '-' it was given up, '=' it is done, '~' it has failed, and follows the job that was submitted again
local function note(key, submission, outcome)
  local name = key .. ':' .. submission
  local text = redis.pcall('GET', name)
  if type(text) == 'string' and string.sub(text, 1, 1) == '+' then
    redis.call('SET', name, outcome .. string.sub(text, 2), 'KEEPTTL')
  end
end
-- The same for all submissions that a record still has, before it starts anew for others. Returns them.
local function note_all(key, outcome)
  local noted = {}
  for _, field in ipairs(redis.call('HKEYS', key)) do
    local submission = string.match(field, '^sub:(%w+)$')
    if submission then
      note(key, submission, outcome)
      noted[#noted + 1] = submission
    end
  end
  return noted
end
