-- Puts a message into a list. Where that is a tenant's list, and was empty, it tells workers that the tenant
-- waits: they know no list of a tenant before.
--
-- command  LPUSH or RPUSH
-- list     its name, which `worker.contract.queues` makes; so are the names of the lists of arrivals
local function put(command, list, message)
  if redis.call(command, list, message) == 1 then
    local queue, step, tenant = string.match(list, '^(.+)\6\22(%d)\6\22t=([a-z0-9-]+)$')
    if queue then
      redis.call('LPUSH', queue .. '\6\22arrivals\6\22' .. (tonumber(step) > 4 and 1 or 0), tenant)
    end
  end
end
