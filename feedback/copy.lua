-- Copies the next records of the log; when none is left, puts the copy in the log's place. Deleting a record from a
-- stream leaves its bytes in the node that held it, in memory and in every file written from there; a copy has none.
-- KEYS  1 fb:log (stream)  2 fb:log:copy (stream)  3 fb:erasure:lease (string)
-- ARGV  1 stream id copied last  2 how many at a time  3 who must hold the lease
-- Returns the stream id copied last; "" where the copy has taken the log's place.
if redis.call('GET', KEYS[3]) ~= ARGV[3] then
  return redis.error_reply('LEASELOST another erasure has begun')
end
local entries = redis.call('XRANGE', KEYS[1], '(' .. ARGV[1], '+', 'COUNT', ARGV[2])
for _, entry in ipairs(entries) do
  redis.call('XADD', KEYS[2], entry[1], unpack(entry[2]))
end
if #entries == tonumber(ARGV[2]) then
  return entries[#entries][1]
end
local info, last = redis.call('XINFO', 'STREAM', KEYS[1]), nil
for i = 1, #info, 2 do
  if info[i] == 'last-generated-id' then
    last = info[i + 1]
  end
end
-- A stream id is never given twice, also where the records at the end are gone.
redis.call('XSETID', KEYS[2], last)
redis.call('UNLINK', KEYS[1])
redis.call('RENAME', KEYS[2], KEYS[1])
return ''
