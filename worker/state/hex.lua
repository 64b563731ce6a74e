-- Reads bits as hexadecimal digits: the client decodes what it reads as text.
--
-- KEYS     the bits
-- Returns  two digits a byte; '' where there are no bits
local hex = function(byte) return string.format('%02x', string.byte(byte)) end
return (string.gsub(redis.call('GET', KEYS[1]) or '', '.', hex))
